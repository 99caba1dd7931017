"""Whether evidence can be believed to be whole. No evidence is never good evidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FRESH = 15.0  # seconds; an Envoy's count is brought once a second
GONE = 600.0  # seconds after which an Envoy that nobody asks any more is taken to be no more
QUIET = 30.0  # seconds without a pair
AHEAD = 60.0  # seconds: pairs are of Redis's clock, all else of Postgres's


@dataclass(frozen=True, slots=True)
class Report:
    """When (seconds ago) an Envoy's count was brought; `node` ends in @ and its admin address."""

    node: str
    age: float


@dataclass(frozen=True, slots=True)
class Gap:
    """Requests by Envoy's count, and those that the ledger ever got or that are on their way to it."""

    sampled: int | None
    arrived: int

    @property
    def missing(self) -> int | None:
        return None if self.sampled is None else self.sampled - self.arrived


def silent(reports: Iterable[Report], asked: Iterable[str]) -> str:
    """Why Envoy's count can't be relied on; empty where it can. `asked` are admin addresses that ought to answer."""
    known = list(reports)
    if not known:
        return "no Envoy's count is known (ABREAST_ENVOY_ADMIN)"
    addresses = {_plain(address) for address in asked}
    late = [one for one in known if one.age > FRESH and (one.age < GONE or _address(one) in addresses)]
    if late:
        worst = max(late, key=lambda one: one.age)
        return f"the Envoy {worst.node} has not told its count for {worst.age:.0f} s"
    if all(one.age > FRESH for one in known):
        return "no Envoy tells its count any more (ABREAST_ENVOY_ADMIN)"
    return ""


def behind(newest: float | None) -> float:
    """Seconds by which Postgres's clock is behind the pairs'. `newest`: seconds since the last one, by that clock."""
    return -newest if newest is not None and newest < -AHEAD else 0.0


def lost(before: int | None, now: Gap) -> int | None:
    """Requests that went missing since; None where that can't be known."""
    if before is None or now.missing is None:
        return None
    return max(0, now.missing - before)


def _address(report: Report) -> str:
    return report.node.rpartition("@")[2]


def _plain(address: str) -> str:
    return address.removeprefix("http://").rstrip("/")
