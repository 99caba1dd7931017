"""Moves counts between findings and the rules that explain them. Pure.

A row does not say what its values were. So with a pair goes its share of what is counted of values (which were greater,
which are explained by their shape), and the whole of it with the last pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from abreast_sidecar.rejudge.places import NOBODY, Known
from abreast_sidecar.store.database import Row

VALUES = ("shape_explained", "new_greater", "new_smaller")
COUNTERS = ("count", "baseline_count", *VALUES)

Slot = tuple[int, int, int, int]  # rule or NOBODY, finding, release of old, release of new


@dataclass(slots=True)
class Counters:
    """`held` is what the ledger has; `changes` what is to be added to it."""

    held: dict[Slot, dict[str, int]]
    changes: dict[Slot, dict[str, int]] = field(default_factory=dict)
    seen: dict[int, tuple[datetime, datetime]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Counters:
        names = ("rule_id", "finding_id", "old_release", "new_release")
        return cls(
            {
                (row[names[0]], row[names[1]], row[names[2]], row[names[3]]): {n: row[n] for n in COUNTERS}
                for row in rows
            }
        )

    def move(self, name: str, origin: Slot | None, target: Slot | None, pairs: int = 1) -> None:
        """`name`: count, or baseline_count. None is where it is not counted at all."""
        moved = {name: pairs}
        if name == "count" and origin is not None:
            have = self._now(origin)
            left = max(have["count"], pairs)
            moved |= {value: have[value] * pairs // left for value in VALUES}
        for slot, sign in ((origin, -1), (target, 1)):
            if slot is not None:
                self._add(slot, {key: sign * value for key, value in moved.items()})

    def shift(self, origin: Slot, target: Slot, counted: Mapping[str, int]) -> None:
        """All that is given."""
        self._add(origin, {name: -value for name, value in counted.items()})
        self._add(target, counted)

    def note(self, finding: int, at: datetime) -> None:
        first, last = self.seen.get(finding, (at, at))
        self.seen[finding] = (min(first, at), max(last, at))

    def _now(self, slot: Slot) -> dict[str, int]:
        held, changed = self.held.get(slot, {}), self.changes.get(slot, {})
        return {name: held.get(name, 0) + changed.get(name, 0) for name in COUNTERS}

    def _add(self, slot: Slot, moved: Mapping[str, int]) -> None:
        changed = self.changes.setdefault(slot, dict.fromkeys(COUNTERS, 0))
        for name, value in moved.items():
            changed[name] += value

    def of_findings(self, findings: Mapping[int, Known]) -> list[dict[str, object]]:
        """Parameters of the query findings_count."""
        made = []
        for (rule, finding, old, new), changed in self.changes.items():
            if rule == NOBODY and finding in findings and any(changed.values()):
                known: dict[str, object] = {"id": finding, "old_release": old, "new_release": new, **changed}
                first, last = (round(at.timestamp() * 1000) for at in self.seen[finding])
                made.append({**known, "impact": findings[finding].impact, "first_ms": first, "last_ms": last})
        return made

    def of_rules(self, unknown: Mapping[Slot, int]) -> list[dict[str, object]]:
        """Parameters of the query rule_findings_count."""
        slots = {slot for slot in self.changes if slot[0] != NOBODY} | unknown.keys()
        empty = dict.fromkeys(COUNTERS, 0)
        return [
            {
                "rule_id": slot[0],
                "id": slot[1],
                "old_release": slot[2],
                "new_release": slot[3],
                **self.changes.get(slot, empty),
                "unknown": unknown.get(slot, 0),
            }
            for slot in slots
        ]
