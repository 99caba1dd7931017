"""What the ledger's reads give."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Generic, TypeVar

import zstandard

from abreast.errors import CaptureError
from abreast.protocol.capture import Capture, decode
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.stats.sequential import Interval, confidence_interval
from abreast_sidecar.stats.verdict import Completeness, EndpointCounts
from abreast_sidecar.store.database import Database, Row, load_statement, sanitise_text

RATE_CONFIDENCE = 0.95  # of the interval of a finding's rate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` until before `end`; None means no limit on that side."""

    start: datetime | None = None
    end: datetime | None = None

    @property
    def is_bounded(self) -> bool:
        return self.start is not None or self.end is not None


@dataclass(frozen=True, slots=True)
class Endpoint:
    service: str
    method: str
    route: str


@dataclass(frozen=True, slots=True)
class Drop:
    service: str
    stage: str  # service or redis
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class DeadLetterCount:
    """Entries that could not be compared and were put apart."""

    reason: str
    count: int
    last: datetime


@dataclass(frozen=True, slots=True)
class CaptureAccounting:
    """Of a service over all time: rows that retention dropped count too. `received` to `late` are captures."""

    service: str
    envoy_sampled: int | None
    not_sent: int  # copies that never left Envoy
    written: int
    received: int
    duplicate: int
    late: int
    joined: int
    timed_out: int
    dead_letters: int

    @property
    def unaccounted(self) -> int | None:
        """Sampled requests without a row: on their way, or lost."""
        return None if self.envoy_sampled is None else self.envoy_sampled - self.written


@dataclass(frozen=True, slots=True)
class LedgerSummary:
    service: str
    outcomes: Mapping[str, int]
    explained: int
    findings: int
    accounts: CaptureAccounting
    drops: tuple[Drop, ...]
    dead_letters: tuple[DeadLetterCount, ...]
    first: datetime | None
    last: datetime | None
    sampled: int | None  # requests of the window, by Envoy's count
    unaccounted: int | None  # of `sampled`, those without a row
    clock_ahead_s: float = 0.0  # seconds by which Postgres's clock is ahead of this machine's

    @property
    def pairs(self) -> int:
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True)
class VerdictEvidence:
    """What a verdict is made of. `envoy_sampled` and `written` are over all time, the rest is of the window."""

    endpoints: tuple[EndpointCounts, ...]
    envoy_sampled: int | None
    written: int
    sampled: int | None
    rows: int
    accounted: int  # of `rows`, those whose outcome is evidence
    release: str | None = None  # of new, that `endpoints` are of; None: of all
    has_ended: bool = False  # whether the window ended before now

    def count_lost(self, pending: int) -> int | None:
        """Requests of the window without a row, of which `pending` are on their way. None: Envoy's count is not known."""
        if self.sampled is None or self.envoy_sampled is None:
            return None
        on_the_way = 0 if self.has_ended else pending  # those are of the present
        return max(0, min(self.sampled - self.rows - on_the_way, max(0, self.envoy_sampled - self.written) - pending))

    def completeness(self, pending: int) -> Completeness:
        """Compare the window with Envoy's count. `pending`: requests in Redis, neither compared nor lost."""
        return self.completeness_without(self.count_lost(pending), pending=0 if self.has_ended else pending)

    def completeness_without(self, lost: int | None, *, pending: int = 0) -> Completeness:
        """Return the completeness with `lost` requests missing, None if that is not known."""
        return Completeness(None if lost is None else self.rows + lost, self.accounted, pending)


def count_missing(sampled: int | None, row_count: int, total_sampled: int | None, total_written: int) -> int | None:
    """Requests of a window without a row. Its edges are not sharp, since a request is counted by Envoy a little before
    its row is made; but no window misses more than is missing over all time.
    """
    if sampled is None or total_sampled is None:
        return None
    return min(sampled - row_count, max(0, total_sampled - total_written))


@dataclass(frozen=True, slots=True)
class EndpointSummary:
    """Times in µs: median and 99th percentile; None where that version was not captured."""

    endpoint: Endpoint
    outcomes: Mapping[str, int]
    findings: int
    old_us: tuple[float, float] | None
    new_us: tuple[float, float] | None

    @property
    def pairs(self) -> int:
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why pairs that show a finding count against no verdict."""

    cause: str  # noise, shape, expected, fixed: of all its pairs; rule, drift: of pairs that are not among its count
    pairs: int
    reason: str
    rule: int = 0
    name: str = ""  # of the rule
    owner: str = ""

    def __str__(self) -> str:
        if self.cause == "rule":
            return f"rule {self.rule} ({self.name}): {self.reason}"
        return f"drift of state: {self.reason}" if self.cause == "drift" else self.reason


@dataclass(frozen=True, slots=True)
class Finding:
    id: int
    endpoint: Endpoint
    part: str
    path: str
    kind: str
    impact: str
    count: int
    compared: int
    baseline_count: int
    state: str  # real, noise, undecided
    reason: str  # empty until it was decided for the first time
    first_seen: datetime
    last_seen: datetime
    detail: Mapping[str, Any]  # old and new: JSON texts of the first pair; for latency a Slowdown
    status: str = "open"  # open, confirmed, expected, fixed, reopened: what people said
    status_reason: str = ""  # of who said it last
    old_releases: tuple[str, ...] = ()  # in which it was seen, the latest first
    new_releases: tuple[str, ...] = ()
    explanations: tuple[Explanation, ...] = ()

    @property
    def is_noise(self) -> bool:
        return self.state == "noise"

    @property
    def is_explained(self) -> bool:
        """Whether nothing of it is left that counts."""
        return self.status in {"expected", "fixed"} or (self.is_noise and self.status != "confirmed")

    @property
    def is_aggregate(self) -> bool:
        """Whether a test of its own found it, over many pairs: no single one shows it."""
        return self.part in {"latency", "cache"} or self.path == "no capture"

    @property
    def rate(self) -> Interval | None:
        """Of the compared pairs, those that show it, however often one looks. None: it is of no single pairs."""
        if self.is_aggregate or not self.compared:
            return None
        return confidence_interval(min(self.count, self.compared), self.compared, 1 - RATE_CONFIDENCE)


@dataclass(frozen=True, slots=True)
class FindingEvent:
    at: datetime
    actor: str
    before: str  # statuses
    after: str
    release: str
    reason: str


@dataclass(frozen=True, slots=True)
class StoredPair:
    id: str
    endpoint: Endpoint
    at: datetime
    outcome: str
    live: str  # old, new or empty
    request: str
    old_status: int
    new_status: int
    old_us: int | None
    new_us: int | None
    old_release: str
    new_release: str
    findings: tuple[int, ...]
    reason: str
    explained: tuple[tuple[int, int], ...] = ()  # finding and the rule that explains it
    drift: tuple[int, ...] = ()  # findings that were drift of state


@dataclass(frozen=True, slots=True)
class StoredDifference:
    part: str
    path: str
    exact_path: str
    kind: str
    impact: str
    old: str | None
    new: str | None
    is_noise: bool
    rule_id: int = 0  # that explains it
    is_drift: bool = False


@dataclass(frozen=True, slots=True)
class StoredPairDetail:
    pair: StoredPair
    captures: tuple[Capture, ...] = ()
    differences: tuple[StoredDifference, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class PageResult(Generic[T]):
    rows: tuple[T, ...]
    next_token: str


DAY_MS = 86_400_000  # ms
MAX_SERVICE_CHARS = 200  # characters
MAX_METHOD_CHARS = 32
MAX_ROUTE_CHARS = 300
MAX_PAIR_ID_CHARS = 200
MAX_REQUEST_CHARS = 2000
MAX_RELEASE_CHARS = 200
MAX_REASON_CHARS = 500
MAX_INTEGER = 2**31 - 1  # µs; an integer column
MAX_SMALLINT = 2**15 - 1  # a smallint column

EndpointKey = tuple[str, str, str]  # service, method, route


@dataclass(slots=True)
class PairRecord:
    """`at` is the entry's time in ms since the epoch, by Redis's clock; `poison` is kept where it can't be read."""

    service: str
    entry_id: str
    time_ms: int
    pair_id: str
    result: ComparisonResult
    blobs: tuple[bytes, ...]
    dead_letter: bytes | None = None
    endpoint: EndpointKey = field(init=False)

    def __post_init__(self) -> None:
        self.service = sanitise_text(self.service, MAX_SERVICE_CHARS)
        self.pair_id = sanitise_text(self.pair_id, MAX_PAIR_ID_CHARS)
        method, route = self.result.method, self.result.route
        self.endpoint = (self.service, sanitise_text(method, MAX_METHOD_CHARS), sanitise_text(route, MAX_ROUTE_CHARS))

    @property
    def day(self) -> int:
        """Days since the epoch, UTC."""
        return self.time_ms // DAY_MS

    @property
    def outcome(self) -> str:
        """What rules explain differs all the same, and stays visible."""
        result = self.result
        return "mismatch" if result.outcome == "match" and result.explained_differences else result.outcome

    @property
    def size_bytes(self) -> int:
        """Bytes of both answers' bodies, as far as they are held."""
        return sum(len(capture.answer.body.content) for capture in (self.result.old, self.result.new) if capture)

    def to_row(self, endpoint_id: int) -> dict[str, Any]:
        """The columns of `pair`; what is left out has its default."""
        result = self.result
        row: dict[str, Any] = {
            "id": self.pair_id,
            "ms": self.time_ms,
            "endpoint_id": endpoint_id,
            "outcome": self.outcome,
        }
        old, new = result.old, result.new
        if old is not None:
            row["old_status"], row["old_us"], row["old_release"] = _make_capture_columns(old)
            row["old_hits"], row["old_misses"] = _read_cache_counts(old)
        if new is not None:
            row["new_status"], row["new_us"], row["new_release"] = _make_capture_columns(new)
            row["new_hits"], row["new_misses"] = _read_cache_counts(new)
        baseline = result.baseline
        for capture in (old, new, baseline):
            if capture is not None and capture.role == "live":
                row["live"] = capture.version
        if old and old.role == "live" and baseline and baseline.role == "baseline" and result.baseline_compared:
            row["baseline_us"] = _clamp_total_us(baseline)
        if has_failed_over(result):
            row["failed_over"] = True
        if any_capture := old or new or result.baseline:
            request = any_capture.request
            target = f"{request.path}?{request.query}" if request.query else request.path
            row["request"] = sanitise_text(target, MAX_REQUEST_CHARS)
        if result.baseline_compared:
            row["baseline_differs"] = bool(result.noise)
        if result.reason:
            row["reason"] = sanitise_text(result.reason, MAX_REASON_CHARS)
        return row


def _read_cache_counts(capture: Capture) -> tuple[int | None, int | None]:
    if capture.cache is None:
        return None, None
    hits, misses = capture.cache
    return max(0, min(hits, MAX_INTEGER)), max(0, min(misses, MAX_INTEGER))


def has_failed_over(result: ComparisonResult) -> bool:
    """Whether the user's request went to new first, and old answered it in the end. Old has a copy of such a request."""
    olds = [capture for capture in (result.old, result.baseline) if capture is not None]
    if all(capture.attempt == 1 for capture in olds):  # as nearly all
        return False
    new = result.new
    is_routed_to_new = any(capture.role == "shadow" for capture in olds) and (new is None or new.role == "live")
    return is_routed_to_new and any(capture.role == "live" and capture.attempt > 1 for capture in olds)


def _make_capture_columns(capture: Capture) -> tuple[int, int, str]:
    return (
        max(0, min(capture.answer.status, MAX_SMALLINT)),
        _clamp_total_us(capture),
        make_release_label(capture.release),
    )


@lru_cache(maxsize=1024)
def make_release_label(release: str) -> str:
    """As it stands in the ledger. Next to all pairs have one of a few."""
    return sanitise_text(release, MAX_RELEASE_CHARS)


def _clamp_total_us(capture: Capture) -> int:
    return max(0, min(capture.total_us, MAX_INTEGER))


SETTABLE_STATUSES = ("open", "confirmed", "expected", "fixed")  # `reopened` happens by itself


@dataclass(frozen=True, slots=True)
class StatusChange:
    """`release`: of new, that has the fix; empty unless the status is `fixed`, and where none is named."""

    status: str
    actor: str
    reason: str
    release: str = ""


async def set_status(database: Database, finding_id: int, change: StatusChange) -> None:
    """Raise NotFoundError, or ArgumentError where what is said to be fixed was seen in that release or a later one."""
    async with database.connection() as connection, connection.transaction():
        # Workers that write the finding lock it too: it is either counted before, or told from here on.
        cursor = await connection.execute(load_statement("findings_lock"), {"ids": [finding_id]})
        if not await cursor.fetchall():
            raise NotFoundError(f"the ledger holds no finding {finding_id}; list them with ListFindings")
        cursor = await connection.execute(load_statement("finding_status_set"), {"id": finding_id, **asdict(change)})
        if not await cursor.fetchall():
            raise ArgumentError(
                f"finding {finding_id} can't be fixed in release {change.release!r}: that release or a later one has "
                "shown it; name a later one, or none"
            )


MAX_EXPLANATIONS = 10


def to_endpoint(row: Row) -> Endpoint:
    return Endpoint(row["service"], row["method"], row["route"])


def to_endpoint_counts(row: Row) -> EndpointCounts:
    numbers = {name: value for name, value in row.items() if name not in {"method", "route"}}
    return EndpointCounts(endpoint=f"{row['method']} {row['route']}", **numbers)


def to_endpoint_summary(row: Row) -> EndpointSummary:
    return EndpointSummary(
        endpoint=to_endpoint(row),
        outcomes=row["outcomes"] or {},
        findings=row["findings"],
        old_us=_to_percentiles(row["old_us"]),
        new_us=_to_percentiles(row["new_us"]),
    )


def _to_percentiles(values: Sequence[float | None] | None) -> tuple[float, float] | None:
    if not values or values[0] is None or values[1] is None:
        return None
    return values[0], values[1]


def to_finding(row: Row) -> Finding:
    return Finding(
        id=row["id"],
        endpoint=to_endpoint(row),
        part=row["part"],
        path=row["path"],
        kind=row["kind"],
        impact=row["impact"],
        count=row["count"],
        compared=row["compared"],
        baseline_count=row["baseline_count"],
        state=row["state"],
        reason=row["reason"],
        first_seen=row["first_seen"],
        last_seen=row["last_seen"],
        detail=row["detail"],
        status=row["status"],
        status_reason=row["status_reason"],
        old_releases=tuple(row["old_releases"]),
        new_releases=tuple(row["new_releases"]),
        explanations=tuple(_iter_explanations(row))[:MAX_EXPLANATIONS],
    )


def _iter_explanations(row: Row) -> Iterator[Explanation]:
    if row["status"] in {"expected", "fixed"}:
        yield Explanation(row["status"], row["count"], row["status_reason"])
    elif row["state"] == "noise" and row["status"] != "confirmed" and row["count"] + row["baseline_count"]:
        cause = "shape" if row["shape_explained"] and not row["baseline_count"] else "noise"
        yield Explanation(cause, row["count"], row["reason"])
    for rule in row["rules"] or ():
        yield Explanation("rule", **rule)
    if row["drift_pairs"]:
        yield Explanation("drift", row["drift_pairs"], "asked again, both versions agreed")


def to_pair(row: Row) -> StoredPair:
    return StoredPair(
        id=row["id"],
        endpoint=to_endpoint(row),
        at=row["at"],
        outcome=row["outcome"],
        live=row["live"] or "",
        request=row["request"],
        old_status=row["old_status"] or 0,
        new_status=row["new_status"] or 0,
        old_us=row["old_us"],
        new_us=row["new_us"],
        old_release=row["old_release"],
        new_release=row["new_release"],
        findings=tuple(row["findings"]),
        reason=row["reason"],
        explained=tuple(zip(row["explained"] or (), row["explained_by"] or (), strict=True)),
        drift=tuple(row["drift"] or ()),
    )


def to_pair_detail(row: Row) -> StoredPairDetail:
    noise_keys, drift_keys = set(row["noisy"]), set(row["drifted"])
    return StoredPairDetail(
        pair=to_pair(row),
        captures=() if row["captures"] is None else read_captures(row["captures"]),
        differences=tuple(to_difference(record, noise_keys, drift_keys) for record in row["differences"] or ()),
    )


def to_difference(record: Row, noise_keys: set[str], drift_keys: set[str]) -> StoredDifference:
    finding = f"{record['part']} {record['kind']} {record['path']}"
    return StoredDifference(
        part=record["part"],
        path=record["path"],
        exact_path=record["exact_path"],
        kind=record["kind"],
        impact=record["impact"],
        old=record.get("old"),
        new=record.get("new"),
        is_noise=finding in noise_keys,
        rule_id=int(record.get("explained_by") or 0),
        is_drift=finding in drift_keys,
    )


COMPARED_OUTCOMES = frozenset(
    {"match", "mismatch", "partial", "oversize"}
)  # outcomes of pairs that could show a finding


MAX_EXAMPLE_BYTES = 64 * 1024 * 1024  # bytes, uncompressed


BLOB_PREFIX_BYTES = 4  # bytes


def read_captures(content: bytes) -> tuple[Capture, ...]:
    """Those captures that this code can read. Raise LedgerError for a damaged example."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as reader:
            blobs = reader.read(MAX_EXAMPLE_BYTES + 1)
    except zstandard.ZstdError as error:
        raise LedgerError(f"an example in the ledger is damaged: {error}") from error
    if len(blobs) > MAX_EXAMPLE_BYTES:
        raise LedgerError(f"an example in the ledger is larger than {MAX_EXAMPLE_BYTES} bytes")
    return tuple(_split_captures(blobs))


def _split_captures(blobs: bytes) -> Iterable[Capture]:
    offset = 0
    while offset < len(blobs):
        length = int.from_bytes(blobs[offset : offset + BLOB_PREFIX_BYTES], "big")
        offset += BLOB_PREFIX_BYTES
        with suppress(CaptureError):  # of a format that this code does not know
            yield decode(blobs[offset : offset + length])
        offset += length
