"""Records that are read from the ledger or written to it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, Generic, TypeAlias, TypeVar, get_type_hints

import zstandard

from abreast.errors import CaptureError
from abreast.protocol.capture import Capture, decode, merge_times
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import get_ledger_status
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.stats.latency import Load, Timing, are_equally_busy, do_waits_match
from abreast_sidecar.stats.sequential import Interval, confidence_interval
from abreast_sidecar.stats.verdict import Completeness, EndpointCounts, ServiceCounts, count_surplus
from abreast_sidecar.store.database import Database, execute, sanitise_text

RATE_CONFIDENCE = 0.95  # for the interval of a finding's rate
SETTABLE_STATUSES = ("open", "confirmed", "expected", "fixed")  # `reopened` is automatic
DAY_MS = 86_400_000
MAX_SERVICE_CHARS = 200
MAX_METHOD_CHARS = 32
MAX_ROUTE_CHARS = 300
MAX_PAIR_ID_CHARS = 200
MAX_REQUEST_CHARS = 2000
MAX_RELEASE_CHARS = 200
MAX_REASON_CHARS = 500
MAX_SHORT_BYTES = 16 * 1024  # of a response that a service sends at once
MAX_INTEGER = 2**31 - 1  # integer column
MAX_SMALLINT = 2**15 - 1  # smallint column
MAX_EXAMPLE_BYTES = 64 * 1024 * 1024  # uncompressed
BLOB_PREFIX_BYTES = 4

Timer: TypeAlias = Callable[[Capture], int]

EndpointKey = tuple[str, str, str]  # service, method, route

T = TypeVar("T")


def from_row(cls: type[T], row: Mapping[str, Any], **computed: Any) -> T:
    """Build a record from the columns that have the names of its fields, and from computed fields.

    A nested record takes its fields from the same row. Arrays become tuples, and null becomes the default of its field.
    """
    values = dict(computed)
    for name, nested, has_default in _plan_fields(cls):  # type: ignore[arg-type]  # classes are hashable
        if name in computed:
            continue
        if nested is not None:
            values[name] = from_row(nested, row)
        elif not has_default or row.get(name) is not None:
            value = row[name]
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


@cache
def _plan_fields(cls: Any) -> tuple[tuple[str, type[Any] | None, bool], ...]:
    """Return the name of each field, its type if it is a record, and whether it has a default."""
    hints = get_type_hints(cls)
    return tuple(
        (item.name, hints[item.name] if is_dataclass(hints[item.name]) else None,
         item.default is not MISSING or item.default_factory is not MISSING)
        for item in fields(cls)
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time from `start` to before `end`; None means no limit."""

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
    """Stream entries that could not be processed, by reason."""

    reason: str
    count: int
    last: datetime


@dataclass(frozen=True, slots=True)
class CaptureAccounting:
    """Accounts of a service over all time, including rows that retention dropped.

    `received`, `duplicate` and `late` count captures, `joined` and `timed_out` count pairs.
    """

    service: str
    envoy_sampled: int | None
    not_sent: int  # copies that never left Envoy
    written: int  # rows
    received: int
    duplicate: int
    late: int
    joined: int
    timed_out: int
    dead_letters: int
    uncertain: int = (
        0  # requests of the last moments of Envoys that ended, which no count and no capture shows; an estimate
    )

    @property
    def unaccounted(self) -> int | None:
        """Return the sampled requests without a row: in flight, or lost."""
        return None if self.envoy_sampled is None else self.envoy_sampled - self.written

    @property
    def surplus(self) -> int:
        """Return the rows beyond Envoy's count."""
        return max(0, -(self.unaccounted or 0))


@dataclass(frozen=True, slots=True)
class EffectiveSample:
    """Requests of the last minutes that the sampling shares selected, and those of them that got their copy."""

    selected: int
    copied: int


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """The load that the newest pairs met. `in_flight` is the median of other requests at the arrival."""

    pairs: int
    unmatched: int  # one version was busier than the other
    old_in_flight: float
    new_in_flight: float


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
    sampled: int | None  # requests in the window, by Envoy's count
    unaccounted: int | None  # sampled requests without a row
    sheds: tuple[Drop, ...] = ()  # not copied by Envoy
    unconverted: tuple[Drop, ...] = ()  # captures of gRPC calls without all their fields
    load: LoadSummary | None = None
    clock_ahead_s: float = 0.0  # seconds by which Postgres's clock is ahead of this machine's

    @property
    def pairs(self) -> int:
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True)
class VerdictEvidence:
    """The evidence for a verdict on a window. `envoy_sampled` and `written` are over all time."""

    endpoints: tuple[EndpointCounts, ...]
    service: ServiceCounts
    envoy_sampled: int | None
    written: int
    sampled: int | None
    rows: int
    accounted: int  # rows whose outcome is evidence
    late: int = 0
    shed: int = 0  # rows without a copy, because it would have queued, or by a rule: as if they had not been sampled
    tolerance: int = 0  # rows that may exceed `sampled` without any fault
    release: str | None = None  # `endpoints` are limited to this release of new; None: no limit
    has_ended: bool = False  # the window ended before now

    def count_lost(self, pending: int) -> int | None:
        """Return the lost requests of the window, if `pending` are in flight. None: Envoy's count is unknown."""
        if self.sampled is None or self.envoy_sampled is None:
            return None
        in_flight = 0 if self.has_ended else pending
        return max(0, min(self.sampled - self.rows - in_flight, max(0, self.envoy_sampled - self.written) - pending))

    def completeness(self, pending: int) -> Completeness:
        """Compare the window with Envoy's count. `pending`: requests in Redis, neither compared nor lost."""
        return self.completeness_without(self.count_lost(pending), pending=0 if self.has_ended else pending)

    def completeness_without(self, lost: int | None, *, pending: int = 0) -> Completeness:
        """Return the completeness with `lost` requests missing, None if that is not known."""
        if lost is None or self.sampled is None:
            return Completeness(None, self.accounted, pending)
        surplus = count_surplus(self.sampled, self.rows, self.tolerance)
        expected = self.sampled if surplus else self.rows + lost
        return Completeness(expected - self.shed, self.accounted, pending, surplus, self.late, self.shed)


def count_missing(sampled: int | None, row_count: int, total_sampled: int | None, total_written: int) -> int | None:
    """Return the requests of a window without a row, or None if Envoy's count is unknown.

    The edges of a window are not sharp, because Envoy counts a request before its row exists. But no window misses more
    than all time does.
    """
    if sampled is None or total_sampled is None:
        return None
    return min(sampled - row_count, max(0, total_sampled - total_written))


@dataclass(frozen=True, slots=True)
class EndpointSummary:
    """An endpoint in a listing. Times are (median, 99th percentile) in µs, or None without captures of the version."""

    endpoint: Endpoint
    outcomes: Mapping[str, int]
    findings: int
    old_us: tuple[float, float] | None
    new_us: tuple[float, float] | None
    source: str = ""  # see `compare.endpoints`

    @property
    def pairs(self) -> int:
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True)
class Explanation:
    """The reason why pairs that show a finding don't count against a verdict."""

    # noise, shape, expected, fixed: explain all pairs in the finding's count; rule, drift: explain pairs outside of it
    cause: str
    pairs: int
    reason: str
    rule: int = 0
    name: str = ""  # name of the rule
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
    reason: str  # for `state`; empty before the first decision
    first_seen: datetime
    last_seen: datetime
    detail: Mapping[str, Any]  # old and new: JSON texts of the first pair; for latency a Slowdown
    status: str = "open"  # open, confirmed, expected, fixed, reopened
    status_reason: str = ""  # for the last change
    old_releases: tuple[str, ...] = ()  # with the finding, the latest first
    new_releases: tuple[str, ...] = ()
    explanations: tuple[Explanation, ...] = ()

    @property
    def is_noise(self) -> bool:
        return self.state == "noise"

    @property
    def is_explained(self) -> bool:
        """Check that no pair of the finding counts against a verdict."""
        return self.status in {"expected", "fixed"} or (self.is_noise and self.status != "confirmed")

    @property
    def is_aggregate(self) -> bool:
        """Check whether a detector found it over many pairs. No single pair shows it."""
        return self.part in {"latency", "cache"} or self.path == "no capture"

    @property
    def rate(self) -> Interval | None:
        """Return the share of compared pairs that show it. The interval is valid at every look. None: it is an aggregate."""
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
    explained: tuple[tuple[int, int], ...] = ()  # (finding, rule)
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
    rule_id: int = 0  # the rule that explains it
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


@dataclass(slots=True)
class PairRecord:
    """A compared pair to write."""

    service: str
    entry_id: str
    time_ms: int  # Unix time of the entry, by Redis's clock
    pair_id: str
    result: ComparisonResult
    blobs: tuple[bytes, ...]
    dead_letter: bytes | None = None  # the content of an entry that could not be processed
    # Marks by finding, once the writer has observed the pair.
    marks: dict[int, int] | None = field(default=None, init=False)
    endpoint: EndpointKey = field(init=False)

    def __post_init__(self) -> None:
        self.service = sanitise_text(self.service, MAX_SERVICE_CHARS)
        self.pair_id = sanitise_text(self.pair_id, MAX_PAIR_ID_CHARS)
        method, route = self.result.method, self.result.route
        self.endpoint = (self.service, sanitise_text(method, MAX_METHOD_CHARS), sanitise_text(route, MAX_ROUTE_CHARS))

    @property
    def day(self) -> int:
        """Return the days since the Unix epoch (UTC)."""
        return self.time_ms // DAY_MS

    @property
    def outcome(self) -> str:
        """Return the outcome. A pair whose differences are all explained is still a mismatch, so it stays visible."""
        result = self.result
        return "mismatch" if result.outcome == "match" and result.explained_differences else result.outcome

    @property
    def size_bytes(self) -> int:
        """Return the captured bytes of both response bodies."""
        return sum(len(capture.answer.body.content) for capture in (self.result.old, self.result.new) if capture)

    def to_row(self, endpoint_id: int) -> dict[str, Any]:
        """Return columns of `pair`. Missing ones have their defaults."""
        result = self.result
        row: dict[str, Any] = {
            "id": self.pair_id,
            "ms": self.time_ms,
            "endpoint_id": endpoint_id,
            "outcome": self.outcome,
        }
        old, new, baseline = result.old, result.new, result.baseline
        get_time_us = _make_timer(capture for capture in (old, new, baseline) if capture is not None)
        if old is not None:
            row["old_status"], row["old_us"], row["old_release"], row["old_hits"], row["old_misses"] = _to_columns(
                old, get_time_us
            )
        if new is not None:
            row["new_status"], row["new_us"], row["new_release"], row["new_hits"], row["new_misses"] = _to_columns(
                new, get_time_us
            )
        row |= _build_load_columns(old, new, get_time_us)
        for capture in (old, new, baseline):
            if capture is not None and capture.role == "live":
                row["live"] = capture.version
        is_copy_of_old = baseline is not None and (baseline.version, baseline.role) == ("old", "baseline")
        if old and old.role == "live" and baseline and is_copy_of_old and result.baseline_compared:
            row["baseline_us"] = _clamp(get_time_us(baseline))
            row["baseline_waits_match"] = new is not None and do_waits_match(
                _get_baseline_load(baseline, old, get_time_us), _get_load(new, get_time_us)
            )
        if result.failed_over:
            row["failed_over"] = True
        if any_capture := old or new or baseline:
            row["request"] = sanitise_text(any_capture.request.target, MAX_REQUEST_CHARS)
        if result.baseline_compared:
            row["baseline_differs"] = bool(result.noise)
        if result.reason:
            row["reason"] = sanitise_text(result.reason, MAX_REASON_CHARS)
        return row


def _make_timer(captures: Iterable[Capture]) -> Timer:
    """Return the function that gives the compared time of each capture of a pair, in µs.

    If all are short responses of known length that Envoy captured, it is the time to the head. Without TCP_NODELAY, a body
    that the service sends at once waits up to 40 ms until Envoy's machine acknowledges the head, more often on busy
    connections.
    """
    if all(_is_short_in_envoy(capture) for capture in captures):
        return lambda capture: capture.first_byte_us or 0
    return lambda capture: capture.total_us


def _is_short_in_envoy(capture: Capture) -> bool:
    answer = capture.answer
    return (
        capture.by_envoy
        and capture.complete
        and capture.first_byte_us is not None
        and answer.body.length <= MAX_SHORT_BYTES
        and any(name == "content-length" for name, _ in answer.headers)
    )


def _to_columns(capture: Capture, get_time_us: Timer) -> tuple[int, int, str, int | None, int | None]:
    """Return status, time, release, cache hits and cache misses."""
    hits, misses = (None, None) if capture.cache is None else map(_clamp, capture.cache)
    status = _clamp(get_ledger_status(capture.answer), MAX_SMALLINT)
    return status, _clamp(get_time_us(capture)), make_release_label(capture.release), hits, misses


def _build_load_columns(old: Capture | None, new: Capture | None, get_time_us: Timer) -> dict[str, int | bool]:
    columns: dict[str, int | bool] = {
        f"{capture.version}_in_flight": _clamp(capture.in_flight, MAX_SMALLINT)
        for capture in (old, new)
        if capture is not None and capture.in_flight is not None
    }
    if old is not None and new is not None:
        columns["waits_match"] = do_waits_match(_get_load(old, get_time_us), _get_load(new, get_time_us))
    return columns


def _get_load(capture: Capture, get_time_us: Timer) -> Load:
    return Load(capture.in_flight, capture.wait_us, get_time_us(capture), capture.by_envoy)


def _get_baseline_load(baseline: Capture, live: Capture, get_time_us: Timer) -> Load:
    """Return the load of a version with its live requests. Envoy counts them in another cluster than the copies."""
    load = _get_load(baseline, get_time_us)
    if not baseline.by_envoy or load.in_flight is None or live.in_flight is None:
        return load
    return load._replace(in_flight=load.in_flight + live.in_flight)


def met_equal_loads(one: Capture, other: Capture, *, live: Capture | None = None) -> bool:
    """Check whether the processes of two responses were equally busy. `live`: the response of which `other` is the copy.

    Times of arrival don't matter, so clocks may differ.
    """
    get_time_us = attrgetter("total_us")
    load = _get_load(other, get_time_us) if live is None else _get_baseline_load(other, live, get_time_us)
    return are_equally_busy(_get_load(one, get_time_us), load)


def _clamp(value: int, maximum: int = MAX_INTEGER) -> int:
    return max(0, min(value, maximum))


@lru_cache(maxsize=1024)
def make_release_label(release: str) -> str:
    """Return the release as the ledger stores it. The cache helps because few releases are in use."""
    return sanitise_text(release, MAX_RELEASE_CHARS)


def read_timing_arrays(row: Mapping[str, Any]) -> list[Timing]:
    """Return the timings of a row with an array for each field. `release` may be missing."""
    releases = row.get("release") or [""] * len(row["old_us"])
    names = ("baseline_us", "waits_match", "baseline_waits_match")
    columns = (row["old_us"], row["new_us"], releases, *(row[name] for name in names))
    return list(map(Timing._make, zip(*columns, strict=True)))


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A new status of a finding. `release`: the release of new with the fix, for the status `fixed`; optional."""

    status: str
    actor: str
    reason: str
    release: str = ""


async def set_status(database: Database, finding_id: int, change: StatusChange) -> None:
    """Set the status of a finding.

    Raise NotFoundError, or ArgumentError if the release with the fix or a later one has shown the finding.
    """
    async with database.connection() as connection, connection.transaction():
        # Workers lock the finding too: this change sees all pairs that they counted before, and they see this change.
        cursor = await execute(connection, "findings_lock", {"ids": [finding_id]})
        if not await cursor.fetchall():
            raise NotFoundError(f"the ledger has no finding {finding_id}; list them with ListFindings")
        cursor = await execute(connection, "finding_status_set", {"id": finding_id, **asdict(change)})
        if not await cursor.fetchall():
            raise ArgumentError(
                f"finding {finding_id} can't be fixed in release {change.release!r}: that release or a later one has "
                "shown it; name a later release, or none"
            )


def read_captures(content: bytes) -> tuple[Capture, ...]:
    """Return the captures of an example, without those of an unknown format. Raise LedgerError for a damaged example."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as reader:
            blobs = reader.read(MAX_EXAMPLE_BYTES + 1)
    except zstandard.ZstdError as error:
        raise LedgerError(f"an example in the ledger is damaged: {error}") from error
    if len(blobs) > MAX_EXAMPLE_BYTES:
        raise LedgerError(f"an example in the ledger has more than {MAX_EXAMPLE_BYTES} bytes")
    captures, offset = [], 0
    while offset < len(blobs):
        length = int.from_bytes(blobs[offset : offset + BLOB_PREFIX_BYTES], "big")
        offset += BLOB_PREFIX_BYTES
        with suppress(CaptureError):
            captures.append(decode(blobs[offset : offset + length]))
        offset += length
    return tuple(merge_times(captures))
