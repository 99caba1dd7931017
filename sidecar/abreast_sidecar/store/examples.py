"""Which pairs of a batch are kept whole, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import zstandard

from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.judged import Judged

LEVEL = 3  # of zstd: 5 µs for 2 KB
PLACE_LIMIT = 1000  # characters


@dataclass(frozen=True, slots=True)
class Example:
    judged: Judged
    findings: tuple[int, ...]  # those it is an example of


class Examples:
    """`kept` is how many each finding has, as far as this process knows; the ledger's own count decides."""

    def __init__(self, kept: dict[int, int], limit: int) -> None:
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

    def note(self, examples: Sequence[Example]) -> None:
        """They are committed, or were refused since others had been kept meanwhile: either way there are so many."""
        for example in examples:
            for finding in example.findings:
                self.kept[finding] = self.kept.get(finding, 0) + 1

    def parameters(self, examples: Sequence[Example]) -> dict[str, Any]:
        links = [
            {
                "finding_id": finding,
                "day": one.judged.day,
                "pair_id": one.judged.pair,
                "size": one.judged.size,
            }
            for one in examples
            for finding in one.findings
        ]
        return {
            "links": json_text(links).decode(),
            "limit": self.limit,
            "days": [one.judged.day for one in examples],
            "pairs": [one.judged.pair for one in examples],
            "captures": [self.pack(one.judged.blobs) for one in examples],
            "differences": [differences_json(one.judged) for one in examples],
        }

    def pack(self, blobs: Sequence[bytes]) -> bytes:
        return self._compressor.compress(b"".join(len(blob).to_bytes(4, "big") + blob for blob in blobs))

    def _room(self, finding: int) -> int:
        return max(0, self.limit - self.kept.get(finding, 0))


def differences_json(judged: Judged) -> str:
    records = [asdict(difference) for difference in judged.judgement.differences + judged.judgement.explained]
    for record in records:
        record["place"] = clean(record["place"], PLACE_LIMIT)
        record["path"] = clean(record["path"], PLACE_LIMIT)
    return json_text(records).decode()
