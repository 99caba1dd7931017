"""What the ledger's reads give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from abreast.capture import Capture
from abreast_sidecar.compare.sequence import Interval, confidence_interval
from abreast_sidecar.compare.verdict import EndpointCounts

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
    place: str  # service or redis
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
        return max(
            0, min(self.sampled - self.rows - on_the_way, max(0, self.envoy_sampled - self.written) - pending)
        )


def count_missing(
    sampled: int | None, row_count: int, total_sampled: int | None, total_written: int
) -> int | None:
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
