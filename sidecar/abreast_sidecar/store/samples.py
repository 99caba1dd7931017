"""Which pairs of a batch are kept whole, and how."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import zstandard
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.volatile import get_values
from abreast_sidecar.stats.features import collect_request_features
from abreast_sidecar.store.database import load_statement, sanitise_text, to_json
from abreast_sidecar.store.records import COMPARED_OUTCOMES, PairRecord

MAX_TRACKED_VALUE_CHARS = 200  # characters of a value that is remembered
MAX_TRACKED_FINDINGS = 2000  # findings
TRACKED_VALUES = 32  # values of each version


class RepeatCounts(NamedTuple):
    """Add 0 or 1 to each counter: there was a pair before, and a version repeated a recent value."""

    repeat_checks: int
    old_repeats: int
    new_repeats: int


NO_REPEATS = RepeatCounts(0, 0, 0)


class RepeatTracker:
    def __init__(self) -> None:
        self._recent_values: dict[int, tuple[deque[Any], deque[Any]]] = {}

    def observe(self, finding: int, difference: Difference) -> RepeatCounts:
        if difference.kind != "changed":
            return NO_REPEATS
        old, new = get_values(difference)
        if not _is_trackable(old) or not _is_trackable(new):
            return NO_REPEATS
        olds, news = self._recent_values.get(finding) or self._start_tracking(finding)
        counts = RepeatCounts(1, int(old in olds), int(new in news)) if olds else NO_REPEATS
        olds.append(old)
        news.append(new)
        return counts

    def _start_tracking(self, finding: int) -> tuple[deque[Any], deque[Any]]:
        if len(self._recent_values) >= MAX_TRACKED_FINDINGS:
            self._recent_values.clear()
        recent: tuple[deque[Any], deque[Any]] = deque(maxlen=TRACKED_VALUES), deque(maxlen=TRACKED_VALUES)
        self._recent_values[finding] = recent
        return recent

    def clear(self) -> None:
        self._recent_values.clear()


def _is_trackable(value: Any) -> bool:
    return (type(value) is str and len(value) <= MAX_TRACKED_VALUE_CHARS) or type(value) in {int, float}


SLOTS_PER_KEY = 200
MAX_SAMPLING_INTERVAL = 50
ANY_FINDING = 0  # in place of a finding: any request of the endpoint


class RequestSampler:
    def __init__(self, seed: int | None = None) -> None:
        self._seen_counts: dict[tuple[int, int], int] = {}  # endpoint, finding → requests
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def clear(self) -> None:
        self._seen_counts.clear()

    def sample(self, records: Iterable[tuple[PairRecord, int, list[int]]]) -> list[dict[str, Any]]:
        """Rows of `request_sample`; the batch has pairs, their endpoints and findings."""
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
                columns = {"ms": record.time_ms, "findings": findings, "features": _extract_features(record)}
                rows |= {
                    key: dict(zip(("endpoint_id", "finding_id", "slot"), key, strict=True)) | columns for key in keys
                }
        return list(rows.values())

    def _pick_slot(self, endpoint: int, finding: int) -> int | None:
        seen_count = self._seen_counts.get((endpoint, finding), 0)
        self._seen_counts[endpoint, finding] = seen_count + 1
        if seen_count < SLOTS_PER_KEY:
            return seen_count
        slot = int(
            self._random.random() * min(seen_count + 1, SLOTS_PER_KEY * MAX_SAMPLING_INTERVAL)
        )  # randrange takes ten times as long
        return slot if slot < SLOTS_PER_KEY else None


def make_sample_parameters(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {"rows": to_json(rows).decode()}


def _extract_features(record: PairRecord) -> dict[str, list[str]]:
    result = record.result
    capture = result.old or result.new
    return collect_request_features(capture.request, result.route) if capture else {}


COMPRESSION_LEVEL = 3  # of zstd: 5 µs for 2 KB
MAX_LOCATION_CHARS = 1000  # characters
MAX_REPLACEMENTS = 20  # examples of a finding that may give way to smaller ones; each has half the size or less


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
        record["exact_path"] = sanitise_text(record["exact_path"], MAX_LOCATION_CHARS)
        record["path"] = sanitise_text(record["path"], MAX_LOCATION_CHARS)
    return to_json(records).decode()
