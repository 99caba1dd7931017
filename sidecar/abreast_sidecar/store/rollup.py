"""What a batch adds to the counters, made only from the pairs that were new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abreast_sidecar.compare import ComparisonResult, Difference
from abreast_sidecar.compare.evidence import get_direction, get_magnitude_shift, is_explained_by_shape
from abreast_sidecar.store.judged import PairRecord
from abreast_sidecar.store.repeats import RepeatTracker

IMPACT_SEVERITY = {"additive": 0, "value": 1, "breaking": 2}
COMPARED_OUTCOMES = frozenset(
    {"match", "mismatch", "partial", "oversize"}
)  # outcomes of pairs that could show a finding

CounterKey = tuple[int, int, int]  # finding or endpoint, release of old, release of new
ReleasePair = tuple[int, int]
DifferencesByFinding = Mapping[int, Sequence[Difference]]  # by finding
ExplainedByFinding = Mapping[
    int, tuple[int, Sequence[Difference]]
]  # by finding, with the rule that explains it
RULE_COUNTERS = ("count", "baseline_count", "shape_explained", "new_greater", "new_smaller")


@dataclass(slots=True)
class CounterDeltas:
    """Parameters of the query findings_count by finding and releases, of endpoints_count by endpoint and releases, and
    pairs by service, day and outcome.
    """

    findings: dict[CounterKey, dict[str, Any]] = field(default_factory=dict)
    endpoints: dict[CounterKey, dict[str, int]] = field(default_factory=dict)
    outcomes: dict[tuple[str, int, str], int] = field(default_factory=dict)
    rules: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict)  # of rule_findings_count
    repeats: RepeatTracker = field(default_factory=RepeatTracker)

    def add_pair(
        self,
        record: PairRecord,
        endpoint_id: int,
        releases: ReleasePair,
        differences: DifferencesByFinding,
        noise: DifferencesByFinding,
    ) -> None:
        self._count_endpoint((endpoint_id, *releases), record.result)
        key = (record.service, record.day, record.outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        for finding, group in differences.items():
            counts = self._get_finding_counts((finding, *releases), group[0], record.time_ms)
            counts["count"] += 1
            sign = get_direction(group[0])
            counts["new_greater"] += sign > 0
            counts["new_smaller"] += sign < 0
            counts["shape_explained"] += is_explained_by_shape(group, record.time_ms / 1000)
            magnitude = get_magnitude_shift(group[0])
            counts["magnitude_up"] += magnitude > 0
            counts["magnitude_down"] += magnitude < 0
            for name, value in self.repeats.observe(finding, group[0])._asdict().items():
                counts[name] += value
        for finding, group in noise.items():
            counts = self._get_finding_counts((finding, *releases), group[0], record.time_ms)
            counts["baseline_count"] += 1
            magnitude = get_magnitude_shift(group[0])
            counts["baseline_magnitude_up"] += magnitude > 0
            counts["baseline_magnitude_down"] += magnitude < 0

    def add_explained(
        self,
        record: PairRecord,
        releases: ReleasePair,
        explained_differences: ExplainedByFinding,
        noise: ExplainedByFinding,
    ) -> None:
        """What rules explain counts for the rule, and not for the finding."""
        for finding, (rule, group) in explained_differences.items():
            counts = self._get_rule_counts(rule, (finding, *releases))
            sign = get_direction(group[0])
            counts["count"] += 1
            counts["new_greater"] += sign > 0
            counts["new_smaller"] += sign < 0
            counts["shape_explained"] += is_explained_by_shape(group, record.time_ms / 1000)
        for finding, (rule, _) in noise.items():
            self._get_rule_counts(rule, (finding, *releases))["baseline_count"] += 1

    def _get_rule_counts(self, rule: int, key: CounterKey) -> dict[str, int]:
        return self.rules.setdefault(
            (rule, *key), {"rule_id": rule, **_make_key_columns(key), **dict.fromkeys(RULE_COUNTERS, 0)}
        )

    def _count_endpoint(self, key: CounterKey, result: ComparisonResult) -> None:
        is_compared = result.outcome in COMPARED_OUTCOMES
        if is_compared or result.baseline_compared:
            counts = self.endpoints.get(key)
            if counts is None:
                counts = self.endpoints[key] = {
                    **_make_key_columns(key),
                    "compared": 0,
                    "baseline_compared": 0,
                }
            counts["compared"] += is_compared
            counts["baseline_compared"] += result.baseline_compared

    def _get_finding_counts(self, key: CounterKey, difference: Difference, time_ms: int) -> dict[str, Any]:
        counts = self.findings.get(key)
        if counts is None:
            counts = self.findings[key] = {
                **_make_key_columns(key),
                "count": 0,
                "baseline_count": 0,
                "shape_explained": 0,
                "new_greater": 0,
                "new_smaller": 0,
                "repeat_checks": 0,
                "old_repeats": 0,
                "new_repeats": 0,
                "magnitude_up": 0,
                "magnitude_down": 0,
                "baseline_magnitude_up": 0,
                "baseline_magnitude_down": 0,
                "impact": difference.impact,
                "first_ms": time_ms,
                "last_ms": time_ms,
            }
        if IMPACT_SEVERITY[difference.impact] > IMPACT_SEVERITY[counts["impact"]]:
            counts["impact"] = difference.impact
        counts["first_ms"] = min(counts["first_ms"], time_ms)
        counts["last_ms"] = max(counts["last_ms"], time_ms)
        return counts

    def build_tally_rows(self) -> list[dict[str, Any]]:
        return [
            {"service": service, "day": day, "outcome": outcome, "pairs": pairs}
            for (service, day, outcome), pairs in self.outcomes.items()
        ]


def _make_key_columns(key: CounterKey) -> dict[str, int]:
    return {"id": key[0], "old_release": key[1], "new_release": key[2]}
