"""Counters of findings, endpoints and outcomes. Batches, reapplied rules and rechecks all change them through here.

A pair stores its marks: the counters, other than the counts of pairs, that it adds to for each finding. So a pair can
move between a finding and a rule with everything that it counts, even after its example is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from psycopg import AsyncConnection

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.volatile import get_direction, get_magnitude_shift, is_explained_by_shape
from abreast_sidecar.store.database import load_statement, to_json

NO_RULE = 0  # in place of a rule: no rule explains the finding
IMPACT_SEVERITY = {"additive": 0, "value": 1, "breaking": 2}
MARKS = {
    "shape_explained": 1,
    "new_greater": 2,
    "new_smaller": 4,
    "repeat_checks": 8,
    "old_repeats": 16,
    "new_repeats": 32,
    "magnitude_up": 64,
    "magnitude_down": 128,
    "baseline_magnitude_up": 256,
    "baseline_magnitude_down": 512,
}
BASELINE_MARKS = MARKS["baseline_magnitude_up"] | MARKS["baseline_magnitude_down"]
REPEAT_MARKS = MARKS["repeat_checks"] | MARKS["old_repeats"] | MARKS["new_repeats"]
COUNTERS = ("count", "baseline_count", *MARKS)
EMPTY_COUNTS = dict.fromkeys((*COUNTERS, "unknown", "drift_count"), 0)

FindingCounterKey = tuple[int, int, int, int]  # rule or NO_RULE, finding, release of old, release of new
EndpointCounterKey = tuple[int, int, int]  # endpoint, release of old, release of new
PairCounter = Literal["count", "baseline_count"]


def compute_marks(differences: Sequence[Difference], time_s: float) -> int:
    """Return the marks of one finding, from all its differences in a pair of old and new, without REPEAT_MARKS."""
    direction, magnitude = get_direction(differences[0]), get_magnitude_shift(differences[0])
    marks = 0
    if direction:
        marks |= MARKS["new_greater"] if direction > 0 else MARKS["new_smaller"]
    if magnitude:
        marks |= MARKS["magnitude_up"] if magnitude > 0 else MARKS["magnitude_down"]
    if is_explained_by_shape(differences, time_s):
        marks |= MARKS["shape_explained"]
    return marks


def compute_baseline_marks(differences: Sequence[Difference]) -> int:
    magnitude = get_magnitude_shift(differences[0])
    if not magnitude:
        return 0
    return MARKS["baseline_magnitude_up"] if magnitude > 0 else MARKS["baseline_magnitude_down"]


def get_rule(differences: Sequence[Difference]) -> int:
    """Return the rule that explains the differences of a finding, or NO_RULE."""
    return int(differences[0].explained_by or NO_RULE)


@dataclass(slots=True)
class CounterDeltas:
    """Changes of counters, collected over the pairs of one transaction."""

    findings: dict[FindingCounterKey, dict[str, Any]] = field(default_factory=dict)
    endpoints: dict[EndpointCounterKey, dict[str, int]] = field(default_factory=dict)
    outcomes: Counter[tuple[str, int, str]] = field(default_factory=Counter)  # by service, day and outcome

    def add_finding(
        self, counter: PairCounter, key: FindingCounterKey, marks: int, *, impact: str, time_ms: int, sign: int = 1
    ) -> None:
        """Count one pair that shows the finding; a sign of -1 takes it away."""
        counts = self.get_finding(key, impact, time_ms)
        counts[counter] += sign
        marks &= BASELINE_MARKS if counter == "baseline_count" else ~BASELINE_MARKS
        if marks:
            for name, mark in MARKS.items():
                if marks & mark:
                    counts[name] += sign

    def move_finding(
        self, origin: FindingCounterKey, target: FindingCounterKey, counts: Mapping[str, int], impact: str, time_ms: int
    ) -> None:
        """Move all counts of a finding in one pair of releases."""
        for key, sign in ((origin, -1), (target, 1)):
            deltas = self.get_finding(key, impact, time_ms)
            for name in COUNTERS:
                deltas[name] += sign * counts[name]

    def get_finding(self, key: FindingCounterKey, impact: str, time_ms: int) -> dict[str, Any]:
        """Return the deltas to change."""
        counts = self.findings.get(key)
        if counts is None:
            columns = dict(zip(("rule_id", "id", "old_release", "new_release"), key, strict=True))
            times = {"first_ms": time_ms, "last_ms": time_ms}
            counts = self.findings[key] = {**columns, **EMPTY_COUNTS, "impact": impact, **times}
        if IMPACT_SEVERITY[impact] > IMPACT_SEVERITY[counts["impact"]]:
            counts["impact"] = impact
        counts["first_ms"] = min(counts["first_ms"], time_ms)
        counts["last_ms"] = max(counts["last_ms"], time_ms)
        return counts

    def add_endpoint(self, key: EndpointCounterKey, *, is_compared: bool, is_baseline_compared: bool) -> None:
        counts = self.endpoints.get(key)
        if counts is None:
            columns = dict(zip(("id", "old_release", "new_release"), key, strict=True))
            counts = self.endpoints[key] = {**columns, "compared": 0, "baseline_compared": 0}
        counts["compared"] += is_compared
        counts["baseline_compared"] += is_baseline_compared

    async def write_findings(self, connection: AsyncConnection[Any]) -> set[int]:
        """Lock the findings and add to their counters, by release and in total, and to those of rules.

        Return the findings that changed.
        """
        rows = [counts for counts in self.findings.values() if any(counts[name] for name in EMPTY_COUNTS)]
        ids: set[int] = {row["id"] for row in rows}
        if rows:
            await connection.execute(load_statement("findings_lock"), {"ids": list(ids)})
            await connection.execute(load_statement("findings_count"), {"rows": to_json(rows).decode()})
        return ids

    async def write_outcomes(self, connection: AsyncConnection[Any]) -> None:
        rows = [
            {"service": service, "day": day, "outcome": outcome, "pairs": pairs}
            for (service, day, outcome), pairs in self.outcomes.items()
            if pairs
        ]
        if rows:
            await connection.execute(load_statement("outcome_counts_add"), {"rows": to_json(rows).decode()})

    async def write_endpoints(self, connection: AsyncConnection[Any]) -> None:
        """Lock the endpoints and add to their counters, by release and in total."""
        if self.endpoints:
            ids = list({row["id"] for row in self.endpoints.values()})
            await connection.execute(load_statement("endpoints_lock"), {"ids": ids})
            rows = to_json(list(self.endpoints.values())).decode()
            await connection.execute(load_statement("endpoints_count"), {"rows": rows})
