"""Which pairs of a batch are kept whole, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zstandard
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import statement
from abreast_sidecar.store.judged import Judged

LEVEL = 3  # of zstd: 5 µs for 2 KB
PLACE_LIMIT = 1000  # characters
REPLACED = 20  # examples of a finding that may give way to smaller ones; each has half the size or less


@dataclass(frozen=True, slots=True)
class Example:
    judged: Judged
    findings: tuple[int, ...]  # those it is an example of


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one finding."""

    count: int = 0
    largest: int = 0  # bytes of both answers' bodies
    replaced: int = 0  # how often one gave way to a smaller one


NONE = Kept()


class Examples:
    """`kept` is what each finding has, as far as this process knows; the ledger itself decides."""

    def __init__(self, kept: dict[int, Kept], limit: int) -> None:
        self.kept = kept
        self.limit = limit
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)

    def choose(self, batch: Sequence[tuple[Judged, Sequence[int]]]) -> list[Example]:
        """The smallest of the batch for each finding that has too few. Nothing is noted as kept yet."""
        wanting = [
            (judged, findings)
            for judged, findings in batch
            if any(self._room(finding) for finding in findings)
        ]
        wanting.sort(key=lambda pair: pair[0].size)
        chosen = []
        taken: dict[int, int] = {}
        for judged, findings in wanting:
            found = tuple(f for f in findings if taken.get(f, 0) < self._room(f))
            if found:
                chosen.append(Example(judged, found))
                for finding in found:
                    taken[finding] = taken.get(finding, 0) + 1
        return chosen

    def smaller(self, batch: Sequence[tuple[Judged, Sequence[int]]]) -> list[Example]:
        """The smallest of the batch for each finding that has enough, but larger ones by far."""
        best: dict[int, Judged] = {}
        for judged, findings in batch:
            for finding in findings:
                if self._gives_way(finding, judged.size) and (
                    finding not in best or judged.size < best[finding].size
                ):
                    best[finding] = judged
        return [Example(judged, (finding,)) for finding, judged in best.items()]

    def _gives_way(self, finding: int, size: int) -> bool:
        kept = self.kept.get(finding, NONE)
        return (
            bool(self.limit)
            and not self._room(finding)
            and kept.replaced < REPLACED
            and size * 2 <= kept.largest
        )

    def note(self, examples: Sequence[Example]) -> None:
        """They are committed, or were refused since others had been kept meanwhile: either way there are so many."""
        for example in examples:
            for finding in example.findings:
                known = self.kept.get(finding, NONE)
                largest = max(known.largest, example.judged.size)
                self.kept[finding] = Kept(known.count + 1, largest, known.replaced)

    def parameters(self, examples: Sequence[Example]) -> dict[str, Any]:
        return {
            "links": json_text(_links(examples)).decode(),
            "limit": self.limit,
            "days": [one.judged.day for one in examples],
            "pairs": [one.judged.pair for one in examples],
            "captures": [self.pack(one.judged.blobs) for one in examples],
            "differences": [differences_json(one.judged) for one in examples],
        }

    async def make_room(self, connection: AsyncConnection[TupleRow], smaller: Sequence[Example]) -> None:
        """Drop the largest of those findings, where others have not done so meanwhile."""
        given = {"rows": json_text(_links(smaller)).decode(), "limit": self.limit, "max_replaced": REPLACED}
        cursor = await connection.execute(statement("examples_evict"), given)
        gone = await cursor.fetchall()
        days, pairs = [day for day, _ in gone], [pair for _, pair in gone]
        await connection.execute(statement("examples_delete_unused"), {"days": days, "pairs": pairs})

    async def look_again(self, connection: AsyncConnection[TupleRow], smaller: Sequence[Example]) -> None:
        """What there is now of those findings."""
        ids = [finding for one in smaller for finding in one.findings]
        cursor = await connection.execute(statement("example_counts"), {"ids": ids})
        for finding, count, largest, replaced in await cursor.fetchall():
            self.kept[finding] = Kept(count, largest, replaced)

    def pack(self, blobs: Sequence[bytes]) -> bytes:
        return self._compressor.compress(b"".join(len(blob).to_bytes(4, "big") + blob for blob in blobs))

    def _room(self, finding: int) -> int:
        return max(0, self.limit - self.kept.get(finding, NONE).count)


def _links(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {
            "finding_id": finding,
            "day": one.judged.day,
            "pair_id": one.judged.pair,
            "body_bytes": one.judged.size,
        }
        for one in examples
        for finding in one.findings
    ]


def differences_json(judged: Judged) -> str:
    records = [
        difference.record() for difference in judged.judgement.differences + judged.judgement.explained
    ]
    for record in records:
        record["place"] = clean(record["place"], PLACE_LIMIT)
        record["path"] = clean(record["path"], PLACE_LIMIT)
    return json_text(records).decode()
