"""Moves counts between findings and the rules that explain them. Pure.

A row does not say what its values were. So with a pair goes its share of what is counted of values (which were greater,
which are explained by their shape), and the whole of it with the last pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from abreast_sidecar.rejudge.places import NO_RULE, FindingRef
from abreast_sidecar.store.database import Row

VALUE_COUNTERS = ("shape_explained", "new_greater", "new_smaller")
MOVED_COUNTERS = ("count", "baseline_count", *VALUE_COUNTERS)

CounterKey = tuple[int, int, int, int]  # rule or NOBODY, finding, release of old, release of new


@dataclass(slots=True)
class CounterMoves:
    """`held` is what the ledger has; `changes` what is to be added to it."""

    stored_counts: dict[CounterKey, dict[str, int]]
    deltas: dict[CounterKey, dict[str, int]] = field(default_factory=dict)
    seen_spans: dict[int, tuple[datetime, datetime]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> CounterMoves:
        key_columns = ("rule_id", "finding_id", "old_release", "new_release")
        return cls(
            {
                (row[key_columns[0]], row[key_columns[1]], row[key_columns[2]], row[key_columns[3]]): {
                    name: row[name] for name in MOVED_COUNTERS
                }
                for row in rows
            }
        )

    def move_pairs(
        self, name: str, origin: CounterKey | None, target: CounterKey | None, pairs: int = 1
    ) -> None:
        """`name`: count, or baseline_count. None is where it is not counted at all."""
        amounts = {name: pairs}
        if name == "count" and origin is not None:
            current = self._current_counts(origin)
            total = max(current["count"], pairs)
            amounts |= {value: current[value] * pairs // total for value in VALUE_COUNTERS}
        for counter_key, sign in ((origin, -1), (target, 1)):
            if counter_key is not None:
                self._add(counter_key, {key: sign * value for key, value in amounts.items()})

    def move_counts(self, origin: CounterKey, target: CounterKey, counts: Mapping[str, int]) -> None:
        """All that is given."""
        self._add(origin, {name: -value for name, value in counts.items()})
        self._add(target, counts)

    def extend_span(self, finding: int, at: datetime) -> None:
        first, last = self.seen_spans.get(finding, (at, at))
        self.seen_spans[finding] = (min(first, at), max(last, at))

    def _current_counts(self, counter_key: CounterKey) -> dict[str, int]:
        stored, delta = self.stored_counts.get(counter_key, {}), self.deltas.get(counter_key, {})
        return {name: stored.get(name, 0) + delta.get(name, 0) for name in MOVED_COUNTERS}

    def _add(self, counter_key: CounterKey, amounts: Mapping[str, int]) -> None:
        delta = self.deltas.setdefault(counter_key, dict.fromkeys(MOVED_COUNTERS, 0))
        for name, value in amounts.items():
            delta[name] += value

    def build_finding_rows(self, findings: Mapping[int, FindingRef]) -> list[dict[str, object]]:
        """Parameters of the query findings_count."""
        rows = []
        for (rule, finding, old, new), delta in self.deltas.items():
            if rule == NO_RULE and finding in findings and any(delta.values()):
                row: dict[str, object] = {"id": finding, "old_release": old, "new_release": new, **delta}
                first, last = (round(moment.timestamp() * 1000) for moment in self.seen_spans[finding])
                rows.append({**row, "impact": findings[finding].impact, "first_ms": first, "last_ms": last})
        return rows

    def build_rule_rows(self, unknown_counts: Mapping[CounterKey, int]) -> list[dict[str, object]]:
        """Parameters of the query rule_findings_count."""
        counter_keys = {
            counter_key for counter_key in self.deltas if counter_key[0] != NO_RULE
        } | unknown_counts.keys()
        empty = dict.fromkeys(MOVED_COUNTERS, 0)
        return [
            {
                "rule_id": counter_key[0],
                "id": counter_key[1],
                "old_release": counter_key[2],
                "new_release": counter_key[3],
                **self.deltas.get(counter_key, empty),
                "unknown": unknown_counts.get(counter_key, 0),
            }
            for counter_key in counter_keys
        ]
