"""Chooses what the ledger keeps of a batch besides its rows: examples, request samples, repeated values, bets."""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import zstandard
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast.protocol.capture import Request
from abreast_sidecar.compare.model import COMPARED_OUTCOMES, ComparisonResult, Difference
from abreast_sidecar.compare.pair import INTERNAL_SERVER_ERROR, get_status
from abreast_sidecar.compare.volatile import get_values
from abreast_sidecar.stats.features import collect_request_features
from abreast_sidecar.store.counters import BET_GROUPS, MARKS
from abreast_sidecar.store.database import execute, sanitise_text, to_json
from abreast_sidecar.store.records import PairRecord

MAX_TRACKED_VALUE_CHARS = 200
MAX_TRACKED_FINDINGS = 2000
TRACKED_VALUES = 32  # per version
SLOTS_PER_KEY = 200
MAX_SAMPLING_INTERVAL = 50  # a key takes at least one of so many requests per slot
ANY_FINDING = 0  # in place of a finding: any request of the endpoint
COMPRESSION_LEVEL = 3  # zstd takes 5 µs for 2 KB
MAX_LOCATION_CHARS = 1000
MAX_REPLACEMENTS = 20  # per finding; each new example has at most half the size
BET_PERIOD_MS = 10_000  # a client counts once per place in a period
FEW_PAIRS = 30  # an endpoint with fewer compared pairs shares its counts with similar endpoints
MAX_KNOWN_BETS = 100_000

_IDENTITY_HEADER = re.compile(
    r"authorization|cookie|.*(user(?!-agent)|session|client|device|account|tenant|api-?key).*"
)


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
        old_values, new_values = self._recent_values[finding]
        marks = MARKS["repeat_checks"] if old_values else 0
        marks |= MARKS["old_repeats"] if old in old_values else 0
        marks |= MARKS["new_repeats"] if new in new_values else 0
        old_values.append(old)
        new_values.append(new)
        return marks


def _is_trackable(value: Any) -> bool:
    return (type(value) is str and len(value) <= MAX_TRACKED_VALUE_CHARS) or type(value) in {int, float}


class BetTracker:
    """Lets each client bet once per place and period, because a session or an outage shows one cause many times.

    The table `bet` holds the keys of the bets, for all workers. It is written in the transaction that counts the bets, so
    a bet counts once and is never lost, whatever worker gets the pairs of a client.
    """

    def __init__(self) -> None:
        self._known_keys: set[int] = set()  # in the table, so another bet with the key does not count

    def clear(self) -> None:
        self._known_keys.clear()

    async def add(self, connection: AsyncConnection[TupleRow], keys: Iterable[int]) -> set[int]:
        """Write the keys, and return those that are new. Call `remember` after the commit."""
        unknown = list(set(keys) - self._known_keys)
        if not unknown:
            return set()
        return {key for (key,) in await (await execute(connection, "bets_add", {"keys": unknown})).fetchall()}

    def remember(self, keys: Iterable[int]) -> None:
        if len(self._known_keys) > MAX_KNOWN_BETS:
            self.clear()
        self._known_keys.update(keys)


def name_bet_place(finding: int, difference: Difference, *, pool: str, compared: int) -> str:
    """Return the place that a client bets on once. Endpoints with few pairs have places in common (`jobs.noise`)."""
    if compared >= FEW_PAIRS:
        return str(finding)
    return f"{pool} {difference.part} {difference.kind} {difference.path}"


def list_bets(place: str, marks: int, client: bytes, time_ms: int) -> dict[int, int]:
    """Return the key of each bet of a pair, by its group of marks. Bets with the same key count once.

    `place`: a finding, or all findings that are classified together.
    """
    period = time_ms // BET_PERIOD_MS
    return {
        group: _hash_to_int(f"{group} {period} {place} ".encode() + client) for group in BET_GROUPS if marks & group
    }


def identify_client(result: ComparisonResult) -> bytes:
    """Return a hash of the client of a pair. Requests without an identity have one client per path and query.

    All requests with a server error, or with a response that broke off, have the same client: an outage is one event.
    """
    capture = result.old or result.new
    is_outage = has_failure(result) or any(difference.part == "error" for difference in result.all_differences)
    if capture is None or is_outage:
        return b""
    request = capture.request
    return blake2b(repr(_read_identity(request) or (request.path, request.query)).encode(), digest_size=8).digest()


def identify_leaver(record: PairRecord) -> int | None:
    """Return a hash of the user who left before a response began, or None.

    Envoy chooses a version for each user. Without an identity, it is a user for each path, query and period.
    """
    result = record.result
    if result.outcome != "aborted":
        return None
    live = next((side for side in (result.old, result.new, result.baseline) if side and side.role == "live"), None)
    if live is None:
        return None
    period = record.time_ms // BET_PERIOD_MS
    return _hash_to_int(repr(_read_identity(live.request) or (live.request.target, period)).encode())


def _read_identity(request: Request) -> list[tuple[str, str]]:
    return [header for header in request.headers if _IDENTITY_HEADER.fullmatch(header[0])]


def _hash_to_int(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)


def has_failure(result: ComparisonResult) -> bool:
    """Check whether a response is a server error."""
    return any(get_status(side) >= INTERNAL_SERVER_ERROR for side in (result.old, result.new, result.baseline) if side)


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
            slots = {finding: self._pick_slot(endpoint, finding) for finding in (ANY_FINDING, *findings)}
            if all(slot is None for slot in slots.values()):
                continue
            capture = record.result.old or record.result.new
            features = collect_request_features(capture.request, record.result.route) if capture else {}
            identity = _read_identity(capture.request) if capture else []
            columns = {
                "endpoint_id": endpoint,
                "ms": record.time_ms,
                "findings": findings,
                "features": features,
                "client": _hash_to_int(repr(identity).encode()) if identity else None,
            }
            for finding, slot in slots.items():
                if slot is not None:
                    rows[endpoint, finding, slot] = {**columns, "finding_id": finding, "slot": slot}
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
        candidates = [pair for pair in batch if any(map(self._count_free_slots, pair[1]))]
        examples = []
        selected: Counter[int] = Counter()  # examples by finding
        for record, findings in sorted(candidates, key=lambda pair: pair[0].size_bytes):
            matching = tuple(item for item in findings if selected[item] < self._count_free_slots(item))
            if matching:
                examples.append(Example(record, matching))
                selected.update(matching)
        return examples

    def select_replacements(self, batch: Sequence[tuple[PairRecord, Sequence[int]]]) -> list[Example]:
        """Choose the smallest pair for each finding without free slots, if a stored example has twice its size."""
        smallest: dict[int, PairRecord] = {}
        for record, findings in batch:
            size = record.size_bytes
            for finding in findings:
                summary = self.summaries.get(finding, NO_EXAMPLES)
                if (
                    summary.count >= self.limit > 0
                    and summary.replacements < MAX_REPLACEMENTS
                    and size * 2 <= summary.largest_bytes
                    and (finding not in smallest or size < smallest[finding].size_bytes)
                ):
                    smallest[finding] = record
        return [Example(record, (finding,)) for finding, record in smallest.items()]

    def mark_stored(self, examples: Sequence[Example]) -> None:
        """Count committed examples. Refused examples count too, because other workers have filled their slots."""
        for example in examples:
            for finding in example.findings:
                summary = self.summaries.get(finding, NO_EXAMPLES)
                largest = max(summary.largest_bytes, example.record.size_bytes)
                self.summaries[finding] = ExampleSummary(summary.count + 1, largest, summary.replacements)

    def build_parameters(self, examples: Sequence[Example]) -> dict[str, Any]:
        return {
            "links": to_json(_make_example_rows(examples)),
            "limit": self.limit,
            "days": [example.record.day for example in examples],
            "pairs": [example.record.pair_id for example in examples],
            "captures": [self.compress(example.record.blobs) for example in examples],
            "differences": [encode_differences(example.record) for example in examples],
        }

    async def evict(self, connection: AsyncConnection[TupleRow], replacements: Sequence[Example]) -> None:
        """Delete the largest example of each finding, unless another worker has done so."""
        rows = to_json(_make_example_rows(replacements))
        parameters = {"rows": rows, "limit": self.limit, "max_replaced": MAX_REPLACEMENTS}
        evicted = await (await execute(connection, "examples_evict", parameters)).fetchall()
        keys = {"days": [day for day, _ in evicted], "pairs": [pair for _, pair in evicted]}
        await execute(connection, "examples_delete_unused", keys)

    async def reload(self, connection: AsyncConnection[TupleRow], replacements: Sequence[Example]) -> None:
        """Read what the ledger holds for these findings."""
        ids = [finding for example in replacements for finding in example.findings]
        cursor = await execute(connection, "example_counts", {"ids": ids})
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
    rows = [difference.to_record() for difference in (*result.differences, *result.explained_differences)]
    for row in rows:
        for column in ("exact_path", "path"):
            row[column] = sanitise_text(row[column], MAX_LOCATION_CHARS)
    return to_json(rows)
