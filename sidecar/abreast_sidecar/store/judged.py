"""What the ledger is given: one judged entry of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from abreast.capture import Capture
from abreast_sidecar.compare import Judgement
from abreast_sidecar.store.clean import clean

DAY = 86_400_000  # ms
SERVICE_LIMIT = 200  # characters
METHOD_LIMIT = 32
ROUTE_LIMIT = 300
PAIR_LIMIT = 200
REQUEST_LIMIT = 2000
RELEASE_LIMIT = 200
REASON_LIMIT = 500
LONGEST = 2**31 - 1  # µs; an integer column
HIGHEST = 2**15 - 1  # a smallint column

EndpointKey = tuple[str, str, str]  # service, method, route


@dataclass(slots=True)
class Judged:
    """`at` is the entry's time in ms since the epoch, by Redis's clock; `poison` is kept where it can't be read."""

    service: str
    entry: str
    at: int
    pair: str
    judgement: Judgement
    blobs: tuple[bytes, ...]
    poison: bytes | None = None
    endpoint: EndpointKey = field(init=False)

    def __post_init__(self) -> None:
        self.service = clean(self.service, SERVICE_LIMIT)
        self.pair = clean(self.pair, PAIR_LIMIT)
        method, route = self.judgement.method, self.judgement.route
        self.endpoint = (self.service, clean(method, METHOD_LIMIT), clean(route, ROUTE_LIMIT))

    @property
    def day(self) -> int:
        """Days since the epoch, UTC."""
        return self.at // DAY

    @property
    def outcome(self) -> str:
        """What rules explain differs all the same, and stays visible."""
        judgement = self.judgement
        return "mismatch" if judgement.outcome == "match" and judgement.explained else judgement.outcome

    @property
    def size(self) -> int:
        """Bytes of both answers' bodies, as far as they are held."""
        return sum(
            len(capture.answer.body.held) for capture in (self.judgement.old, self.judgement.new) if capture
        )

    def row(self, endpoint: int) -> dict[str, Any]:
        """The columns of `pair`; what is left out has its default."""
        judgement = self.judgement
        row: dict[str, Any] = {
            "id": self.pair,
            "ms": self.at,
            "endpoint_id": endpoint,
            "outcome": self.outcome,
        }
        old, new = judgement.old, judgement.new
        if old is not None:
            row["old_status"], row["old_us"], row["old_release"] = _side(old)
            row["old_hits"], row["old_misses"] = _lookups(old)
        if new is not None:
            row["new_status"], row["new_us"], row["new_release"] = _side(new)
            row["new_hits"], row["new_misses"] = _lookups(new)
        again = judgement.baseline
        for capture in (old, new, again):
            if capture is not None and capture.role == "live":
                row["live"] = capture.version
        if old and old.role == "live" and again and again.role == "baseline" and judgement.baseline_compared:
            row["baseline_us"] = _time(again)
        if failed_over(judgement):
            row["failed_over"] = True
        if shown := old or new or judgement.baseline:
            request = shown.request
            target = f"{request.path}?{request.query}" if request.query else request.path
            row["request"] = clean(target, REQUEST_LIMIT)
        if judgement.baseline_compared:
            row["baseline_differs"] = bool(judgement.noise)
        if judgement.reason:
            row["reason"] = clean(judgement.reason, REASON_LIMIT)
        return row


def _lookups(capture: Capture) -> tuple[int | None, int | None]:
    if capture.cache is None:
        return None, None
    hits, misses = capture.cache
    return max(0, min(hits, LONGEST)), max(0, min(misses, LONGEST))


def failed_over(judgement: Judgement) -> bool:
    """Whether the user's request went to new first, and old answered it in the end. Old has a copy of such a request."""
    olds = [one for one in (judgement.old, judgement.baseline) if one is not None]
    if all(one.attempt == 1 for one in olds):  # as nearly all
        return False
    new = judgement.new
    meant_for_new = any(one.role == "shadow" for one in olds) and (new is None or new.role == "live")
    return meant_for_new and any(one.role == "live" and one.attempt > 1 for one in olds)


def _side(capture: Capture) -> tuple[int, int, str]:
    return (
        max(0, min(capture.answer.status, HIGHEST)),
        _time(capture),
        release_label(capture.release),
    )


@lru_cache(maxsize=1024)
def release_label(release: str) -> str:
    """As it stands in the ledger. Next to all pairs have one of a few."""
    return clean(release, RELEASE_LIMIT)


def _time(capture: Capture) -> int:
    return max(0, min(capture.total_us, LONGEST))
