"""Chooses what the ledger keeps of a batch besides its rows: examples, request samples, repeated values."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import zstandard
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.volatile import get_values
from abreast_sidecar.stats.features import collect_request_features
from abreast_sidecar.store.counters import MARKS
from abreast_sidecar.store.database import load_statement, sanitise_text, to_json
from abreast_sidecar.store.records import COMPARED_OUTCOMES, PairRecord

MAX_TRACKED_VALUE_CHARS = 200
MAX_TRACKED_FINDINGS = 2000
TRACKED_VALUES = 32  # per version
SLOTS_PER_KEY = 200
MAX_SAMPLING_INTERVAL = 50  # a key takes at least one of so many requests per slot
ANY_FINDING = 0  # in place of a finding: any request of the endpoint
COMPRESSION_LEVEL = 3  # zstd takes 5 µs for 2 KB
MAX_LOCATION_CHARS = 1000
MAX_REPLACEMENTS = 20  # per finding; each new example has at most half the size


class RepeatTracker:
    """Counts how often a version repeats one of its recent values of a finding."""

    def __init__(self) -> None:
        self._recent_values: dict[int, tuple[deque[Any], deque[Any]]] = {}

    def clear(self) -> None:
        self._recent_values.clear()

    def observe(self, finding: int, difference: Difference) -> int:
        """Remember both values. Return the marks `repeat_checks`, `old_repeats` and `new_repeats`, or 0 for none."""
        if difference.kind != "changed":
            return 0
        old, new = get_values(difference)
        if not _is_trackable(old) or not _is_trackable(new):
            return 0
        if finding not in self._recent_values:
            if len(self._recent_values) >= MAX_TRACKED_FINDINGS:
                self._recent_values.clear()
            self._recent_values[finding] = deque(maxlen=TRACKED_VALUES), deque(maxlen=TRACKED_VALUES)
        olds, news = self._recent_values[finding]
        marks = MARKS["repeat_checks"] if olds else 0
        marks |= MARKS["old_repeats"] if old in olds else 0
        marks |= MARKS["new_repeats"] if new in news else 0
        olds.append(old)
        news.append(new)
        return marks


def _is_trackable(value: Any) -> bool:
    return (type(value) is str and len(value) <= MAX_TRACKED_VALUE_CHARS) or type(value) in {int, float}


class RequestSampler:
    """Keeps a random sample of the requests of each endpoint, and of those that show each finding."""

    def __init__(self, seed: int | None = None) -> None:
        self._seen_counts: dict[tuple[int, int], int] = {}  # endpoint, finding → requests
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def clear(self) -> None:
        self._seen_counts.clear()

    def sample(self, records: Iterable[tuple[PairRecord, int, list[int]]]) -> list[dict[str, Any]]:
        """Return rows of `request_sample` for (pair, endpoint id, ids of its findings)."""
        rows: dict[tuple[int, int, int], dict[str, Any]] = {}
        for record, endpoint, findings in records:
            if record.result.outcome not in COMPARED_OUTCOMES:
                continue
            keys = [
                (endpoint, finding, slot)
                for finding in (ANY_FINDING, *findings)
                if (slot := self._pick_slot(endpoint, finding)) is not None
            ]
            if keys:
                capture = record.result.old or record.result.new
                features = collect_request_features(capture.request, record.result.route) if capture else {}
                columns = {"ms": record.time_ms, "findings": findings, "features": features}
                rows |= {
                    key: dict(zip(("endpoint_id", "finding_id", "slot"), key, strict=True)) | columns for key in keys
                }
        return list(rows.values())

    def _pick_slot(self, endpoint: int, finding: int) -> int | None:
        seen_count = self._seen_counts.get((endpoint, finding), 0)
        self._seen_counts[endpoint, finding] = seen_count + 1
        if seen_count < SLOTS_PER_KEY:
            return seen_count
        interval = min(seen_count + 1, SLOTS_PER_KEY * MAX_SAMPLING_INTERVAL)
        slot = int(self._random.random() * interval)  # randrange takes ten times as long
        return slot if slot < SLOTS_PER_KEY else None


@dataclass(frozen=True, slots=True)
class Example:
    record: PairRecord
    findings: tuple[int, ...]  # shown by the pair


@dataclass(frozen=True, slots=True)
class ExampleSummary:
    """The stored examples of one finding."""

    count: int = 0
    largest_bytes: int = 0  # both response bodies
    replacements: int = 0  # by smaller examples, so far


NO_EXAMPLES = ExampleSummary()


class ExampleSelector:
    """Chooses examples by what this process knows of the stored ones. The ledger enforces the limit."""

    def __init__(self, summaries: dict[int, ExampleSummary], limit: int) -> None:
        self.summaries = summaries
        self.limit = limit
        self._compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)

    def select(self, batch: Sequence[tuple[PairRecord, Sequence[int]]]) -> list[Example]:
        """Choose the smallest pairs for each finding that has free slots. Call `mark_stored` after the commit."""
        candidates = [
            (record, findings)
            for record, findings in batch
            if any(self._count_free_slots(finding) for finding in findings)
        ]
        candidates.sort(key=lambda pair: pair[0].size_bytes)
        examples = []
        selected_counts: dict[int, int] = {}
        for record, findings in candidates:
            matching = tuple(
                finding_id
                for finding_id in findings
                if selected_counts.get(finding_id, 0) < self._count_free_slots(finding_id)
            )
            if matching:
                examples.append(Example(record, matching))
                for finding in matching:
                    selected_counts[finding] = selected_counts.get(finding, 0) + 1
        return examples

    def select_replacements(self, batch: Sequence[tuple[PairRecord, Sequence[int]]]) -> list[Example]:
        """Choose the smallest pair for each finding without free slots, if a stored example has twice its size."""
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
        """Count committed examples. Refused examples count too, because other workers have filled their slots."""
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
        """Delete the largest example of each finding, unless another worker has done so."""
        parameters = {
            "rows": to_json(_make_example_rows(replacements)).decode(),
            "limit": self.limit,
            "max_replaced": MAX_REPLACEMENTS,
        }
        cursor = await connection.execute(load_statement("examples_evict"), parameters)
        evicted = await cursor.fetchall()
        days, pairs = [day for day, _ in evicted], [pair for _, pair in evicted]
        await connection.execute(load_statement("examples_delete_unused"), {"days": days, "pairs": pairs})

    async def reload(self, connection: AsyncConnection[TupleRow], replacements: Sequence[Example]) -> None:
        """Read what the ledger holds for these findings."""
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


def encode_differences(record: PairRecord) -> str:
    """Return the column `differences` of an example."""
    result = record.result
    records = [difference.to_record() for difference in (*result.differences, *result.explained_differences)]
    for columns in records:
        columns["exact_path"] = sanitise_text(columns["exact_path"], MAX_LOCATION_CHARS)
        columns["path"] = sanitise_text(columns["path"], MAX_LOCATION_CHARS)
    return to_json(records).decode()
