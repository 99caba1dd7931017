"""Holds what Abreast reports against what was planted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from abreast_demo.load import Tally
from abreast_demo.plants import ADDITIVE, NOISE, REGRESSIONS, Place, Plant


@dataclass(frozen=True, slots=True)
class Seen:
    """A finding, as the API gave it."""

    id: int
    place: Place
    impact: str
    noise: bool
    count: int
    baseline_count: int
    summary: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """How the sampled requests ended, beside Envoy's count of them."""

    outcomes: Mapping[str, int]
    envoy: int | None
    unaccounted: int | None
    pending: int | None  # None: not known now
    drops: Mapping[str, int]
    explained: int = 0  # of the mismatches: all that differs is noise or was added

    @property
    def rows(self) -> int:
        return sum(self.outcomes.values())

    def settled(self, sent: int) -> bool:
        """Whether all that Envoy counted is in the ledger, and Envoy has counted all that was sent."""
        summed = self.envoy is not None and self.rows == self.envoy >= sent
        return summed and self.pending == 0 and self.unaccounted == 0

    def complete_since(self, before: Ledger) -> bool:
        """Whether what Envoy counted since is in the ledger too, beside what was still on its way then."""
        if self.envoy is None or before.envoy is None or self.pending or self.envoy == before.envoy:
            return False
        return self.envoy - before.envoy == self.rows - before.rows - (before.pending or 0)


@dataclass(frozen=True, slots=True)
class Result:
    tally: Tally
    ledger: Ledger
    seen: tuple[Seen, ...]

    @property
    def regressions(self) -> list[Seen]:
        return regressions(self.seen)

    @property
    def additive(self) -> list[Seen]:
        return [one for one in self.seen if not one.noise and one.impact == "additive"]

    @property
    def noise(self) -> list[Seen]:
        return [one for one in self.seen if one.noise]

    @property
    def found(self) -> list[Plant]:
        return [plant for plant in REGRESSIONS if covered(plant, self.regressions)]

    @property
    def missed(self) -> list[Plant]:
        return missing(self.seen)

    @property
    def unexpected(self) -> list[Seen]:
        """Reported, and nobody planted it; among them what is harmless and was not recognised as such."""
        heavier = self.heavier
        return [
            *(one for one in self.regressions if one not in heavier and not _planted(one, REGRESSIONS)),
            *(one for one in self.additive if not _planted(one, ADDITIVE)),
        ]

    @property
    def heavier(self) -> list[Seen]:
        """Slower without having been made so: see `plants.HEAVIER`."""
        return [
            one for one in self.regressions if one.place.part == "latency" and not _planted(one, REGRESSIONS)
        ]

    @property
    def as_planted(self) -> bool:
        return not (self.missed or self.unexpected or self.tally.user_errors) and self.ledger.settled(
            self.tally.safe
        )

    def for_machines(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "requests": self.tally.requests,
            "user_errors": self.tally.user_errors,
            "sampled": ledger.envoy,
            "outcomes": dict(ledger.outcomes),
            "findings": [_row(one) for one in self.regressions],
            "additive": [_row(one) for one in self.additive],
            "noise": [_row(one) for one in self.noise],
            "planted": {
                "expected": [plant.name for plant in REGRESSIONS],
                "found": [plant.name for plant in self.found],
                "missed": [plant.name for plant in self.missed],
                "unexpected": [str(one.place) for one in self.unexpected],
            },
            "heavier": [one.place.endpoint for one in self.heavier],
            "harmless": {plant.name: covered(plant, self._harmless(plant)) for plant in (*NOISE, *ADDITIVE)},
            "ledger": {
                "rows": ledger.rows,
                "explained": ledger.explained,
                "envoy": ledger.envoy,
                "unaccounted": ledger.unaccounted,
                "pending": ledger.pending,
                "drops": dict(ledger.drops),
            },
            "statuses": {str(status): count for status, count in sorted(self.tally.statuses.items())},
            "as_planted": self.as_planted,
        }

    def _harmless(self, plant: Plant) -> list[Seen]:
        return self.noise if plant in NOISE else self.additive


def regressions(seen: Iterable[Seen]) -> list[Seen]:
    return [one for one in seen if not one.noise and one.impact != "additive"]


def missing(seen: Iterable[Seen]) -> list[Plant]:
    reported = regressions(seen)
    return [plant for plant in REGRESSIONS if not covered(plant, reported)]


def covered(plant: Plant, seen: Iterable[Seen]) -> bool:
    return any(one.place == plant.place for one in seen)


def _planted(one: Seen, plants: Iterable[Plant]) -> bool:
    return any(one.place == plant.place for plant in plants)


def _row(one: Seen) -> dict[str, Any]:
    place = one.place
    return {
        "id": one.id,
        "endpoint": place.endpoint,
        "part": place.part,
        "path": place.path,
        "kind": place.kind,
        "count": one.count,
        "summary": one.summary,
    }
