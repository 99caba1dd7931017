"""What users and the ledger noticed of one drill."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from abreast_demo.load import SERVER_ERROR, USER_HEADER, Load
from abreast_demo.traffic import Request
from abreast_demo.verdict import Ledger

VERSION_HEADER = "x-abreast-version"
RECOVERY = 40.0  # seconds that new gets to answer users again
OF_NEW = "new-"  # drills whose names begin so break new
KILLED = "new-killed"


@dataclass(frozen=True, slots=True)
class Answered:
    sent: float  # monotonic
    at: float
    version: str  # empty where nobody answered
    safe: bool
    error: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Times in seconds. What is None has no meaning for this drill, or was not seen in time."""

    drill: str
    requests: int
    safe_errors: int  # that users of GET, HEAD, OPTIONS saw
    unsafe_errors: int
    longest_wait: float  # of those users
    until_old: float | None  # from the break to the last answer by new
    until_new: float | None  # from the repair to the first one
    sampled: int | None  # by Envoy's own count
    pending: (
        int | None
    )  # of them, still on their way: what a dead sidecar had begun with is taken over after a minute
    lost: int | None  # of them, neither in the ledger nor on their way
    trouble: str  # why the drill failed; empty where it did not

    def for_machines(self) -> dict[str, Any]:
        return {**asdict(self), "passed": not self.trouble}


class Users(Load):
    """Keeps who answered, and when."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.seen: list[Answered] = []

    async def _one(self, request: Request) -> None:
        sent, version, error = time.monotonic(), "", True
        headers = {
            USER_HEADER: request.user,
            **({"content-type": "application/json"} if request.body else {}),
        }
        try:
            answer = await self.client.request(
                request.method, request.path, content=request.body or None, headers=headers
            )
            version = answer.headers.get(VERSION_HEADER, "")
            error = answer.status_code >= SERVER_ERROR
        except httpx.HTTPError:
            pass
        finally:
            self._places.release()
        self.tally.requests += 1
        self.seen.append(Answered(sent, time.monotonic(), version, request.safe, error))

    def met(self, version: str) -> bool:
        return any(one.version == version for one in self.seen)


@dataclass
class Run:
    """One drill: when the part was broken and repaired, and what users saw from then on."""

    name: str
    users: Users
    broken: float = 0.0  # when that began
    gone: float = 0.0  # when it was done
    repaired: float = 0.0
    since: int = 0  # of users.seen
    with_new: bool = True  # users were on new before

    @property
    def is_new(self) -> bool:
        return self.name.startswith(OF_NEW)

    @property
    def seen(self) -> list[Answered]:
        return self.users.seen[self.since :]

    @property
    def _back(self) -> list[Answered]:
        """Answers as they were before."""
        return [
            one
            for one in self.seen
            if one.sent > self.repaired and not one.error and (one.version == "new" or not self.with_new)
        ]

    def is_back(self) -> bool:
        return bool(self._back)

    @property
    def until_old(self) -> float | None:
        """None too where new still answered when it was repaired, or nobody noticed in time."""
        if not self.is_new:
            return None
        late = [
            one.at
            for one in self.seen
            if one.version == "new"
            and self.broken < one.at < self.repaired
            and (self.name != KILLED or one.sent <= self.gone)
        ]
        last = max(late, default=self.broken)
        after = [one for one in self.seen if last < one.at < self.repaired and one.version == "old"]
        return last - self.broken if after else None

    @property
    def until_new(self) -> float | None:
        if not self.is_new or not self._back:
            return None
        return max(min(one.at for one in self._back) - self.repaired, 0.0)

    def report(self, before: Ledger, after: Ledger) -> Report:
        safe = [one for one in self.seen if one.safe]
        errors = {kind: sum(one.error for one in self.seen if one.safe is kind) for kind in (True, False)}
        sampled = _difference(after.envoy, before.envoy)
        arrived = after.rows - before.rows + (after.pending or 0) - (before.pending or 0)
        return Report(
            drill=self.name,
            requests=len(self.seen),
            safe_errors=errors[True],
            unsafe_errors=errors[False],
            longest_wait=max((one.at - one.sent for one in safe), default=0.0),
            until_old=self.until_old,
            until_new=self.until_new,
            sampled=sampled,
            pending=after.pending,
            lost=None if sampled is None else sampled - arrived,
            trouble=self._trouble(errors),
        )

    def _trouble(self, errors: dict[bool, int]) -> str:
        if errors[True]:
            return f"{errors[True]} users of safe methods saw an error"
        if errors[False] and not self.is_new:
            return f"{errors[False]} users saw an error"
        if self.is_new and self.until_old is None:
            return "new was not left alone in time"
        if not self.is_back():
            who = "new did not answer users" if self.with_new else "nobody answered users"
            return f"{who} again within {RECOVERY:g} s"
        return ""


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None else after - (before or 0)
