"""Which pairs of a batch are kept whole, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zstandard
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast_sidecar.store.clean import sanitise_text, to_json
from abreast_sidecar.store.database import load_statement
from abreast_sidecar.store.judged import PairRecord

COMPRESSION_LEVEL = 3  # of zstd: 5 µs for 2 KB
MAX_LOCATION_CHARS = 1000  # characters
MAX_REPLACEMENTS = (
    20  # examples of a finding that may give way to smaller ones; each has half the size or less
)


@dataclass(frozen=True, slots=True)
class Example:
    record: PairRecord
    findings: tuple[int, ...]  # those it is an example of


@dataclass(frozen=True, slots=True)
class ExampleSummary:
    """Of one finding."""

    count: int = 0
    largest_bytes: int = 0  # bytes of both answers' bodies
    replacements: int = 0  # how often one gave way to a smaller one


NO_EXAMPLES = ExampleSummary()


class ExampleSelector:
    """`kept` is what each finding has, as far as this process knows; the ledger itself decides."""

    def __init__(self, summaries: dict[int, ExampleSummary], limit: int) -> None:
        self.summaries = summaries
        self.limit = limit
        self._compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)

    def select(self, batch: Sequence[tuple[PairRecord, Sequence[int]]]) -> list[Example]:
        """The smallest of the batch for each finding that has too few. Nothing is noted as kept yet."""
        candidates = [
            (record, findings)
            for record, findings in batch
            if any(self._count_free_slots(finding) for finding in findings)
        ]
        candidates.sort(key=lambda pair: pair[0].size_bytes)
        examples = []
        selected_counts: dict[int, int] = {}
        for record, findings in candidates:
            wanted_by = tuple(
                finding_id
                for finding_id in findings
                if selected_counts.get(finding_id, 0) < self._count_free_slots(finding_id)
            )
            if wanted_by:
                examples.append(Example(record, wanted_by))
                for finding in wanted_by:
                    selected_counts[finding] = selected_counts.get(finding, 0) + 1
        return examples

    def select_replacements(self, batch: Sequence[tuple[PairRecord, Sequence[int]]]) -> list[Example]:
        """The smallest of the batch for each finding that has enough, but larger ones by far."""
        best: dict[int, PairRecord] = {}
        for record, findings in batch:
            for finding in findings:
                if self._is_replaceable(finding, record.size_bytes) and (
                    finding not in best or record.size_bytes < best[finding].size_bytes
                ):
                    best[finding] = record
        return [Example(record, (finding,)) for finding, record in best.items()]

    def _is_replaceable(self, finding: int, size: int) -> bool:
        summary = self.summaries.get(finding, NO_EXAMPLES)
        return (
            bool(self.limit)
            and not self._count_free_slots(finding)
            and summary.replacements < MAX_REPLACEMENTS
            and size * 2 <= summary.largest_bytes
        )

    def mark_stored(self, examples: Sequence[Example]) -> None:
        """They are committed, or were refused since others had been kept meanwhile: either way there are so many."""
        for example in examples:
            for finding in example.findings:
                summary = self.summaries.get(finding, NO_EXAMPLES)
                largest = max(summary.largest_bytes, example.record.size_bytes)
                self.summaries[finding] = ExampleSummary(summary.count + 1, largest, summary.replacements)

    def build_parameters(self, examples: Sequence[Example]) -> dict[str, Any]:
        return {
            "links": to_json(_make_example_rows(examples)).decode(),
            "limit": self.limit,
            "days": [example.record.day for example in examples],
            "pairs": [example.record.pair_id for example in examples],
            "captures": [self.compress(example.record.blobs) for example in examples],
            "differences": [encode_differences(example.record) for example in examples],
        }

    async def evict(self, connection: AsyncConnection[TupleRow], replacements: Sequence[Example]) -> None:
        """Drop the largest of those findings, where others have not done so meanwhile."""
        parameters = {
            "rows": to_json(_make_example_rows(replacements)).decode(),
            "limit": self.limit,
            "max_replaced": MAX_REPLACEMENTS,
        }
        cursor = await connection.execute(load_statement("examples_evict"), parameters)
        dropped = await cursor.fetchall()
        days, pairs = [day for day, _ in dropped], [pair for _, pair in dropped]
        await connection.execute(load_statement("examples_delete_unused"), {"days": days, "pairs": pairs})

    async def reload(self, connection: AsyncConnection[TupleRow], replacements: Sequence[Example]) -> None:
        """What there is now of those findings."""
        ids = [finding for example in replacements for finding in example.findings]
        cursor = await connection.execute(load_statement("example_counts"), {"ids": ids})
        for finding, count, largest, replacement_count in await cursor.fetchall():
            self.summaries[finding] = ExampleSummary(count, largest, replacement_count)

    def compress(self, blobs: Sequence[bytes]) -> bytes:
        return self._compressor.compress(b"".join(len(blob).to_bytes(4, "big") + blob for blob in blobs))

    def _count_free_slots(self, finding: int) -> int:
        return max(0, self.limit - self.summaries.get(finding, NO_EXAMPLES).count)


def _make_example_rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {
            "finding_id": finding,
            "day": example.record.day,
            "pair_id": example.record.pair_id,
            "body_bytes": example.record.size_bytes,
        }
        for example in examples
        for finding in example.findings
    ]


def encode_differences(pair_record: PairRecord) -> str:
    records = [
        difference.to_record()
        for difference in pair_record.result.differences + pair_record.result.explained_differences
    ]
    for record in records:
        record["place"] = sanitise_text(record["place"], MAX_LOCATION_CHARS)
        record["path"] = sanitise_text(record["path"], MAX_LOCATION_CHARS)
    return to_json(records).decode()
