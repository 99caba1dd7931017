"""What the ledger is given: one judged entry of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from abreast.capture import Capture
from abreast_sidecar.compare import ComparisonResult
from abreast_sidecar.store.clean import sanitise_text

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
        self.endpoint = (
            self.service,
            sanitise_text(method, MAX_METHOD_CHARS),
            sanitise_text(route, MAX_ROUTE_CHARS),
        )

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
        return sum(
            len(capture.answer.body.content) for capture in (self.result.old, self.result.new) if capture
        )

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
        if (
            old
            and old.role == "live"
            and baseline
            and baseline.role == "baseline"
            and result.baseline_compared
        ):
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
    is_routed_to_new = any(capture.role == "shadow" for capture in olds) and (
        new is None or new.role == "live"
    )
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
