"""What a batch adds to the counters, made only from the pairs that were new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abreast_sidecar.compare import Difference, Judgement
from abreast_sidecar.compare.evidence import explained, far, lean
from abreast_sidecar.store.judged import Judged
from abreast_sidecar.store.repeats import Repeats

SEVERITY = {"additive": 0, "value": 1, "breaking": 2}
COMPARED = frozenset(
    {"match", "mismatch", "partial", "oversize"}
)  # outcomes of pairs that could show a finding

Key = tuple[int, int, int]  # finding or endpoint, release of old, release of new
Releases = tuple[int, int]
Found = Mapping[int, Sequence[Difference]]  # by finding
Hidden = Mapping[int, tuple[int, Sequence[Difference]]]  # by finding, with the rule that explains it
COUNTERS = ("count", "baseline_count", "shape_explained", "new_greater", "new_smaller")


@dataclass(slots=True)
class Rollup:
    """Parameters of the query findings_count by finding and releases, of endpoints_count by endpoint and releases, and
    pairs by service, day and outcome.
    """

    findings: dict[Key, dict[str, Any]] = field(default_factory=dict)
    endpoints: dict[Key, dict[str, int]] = field(default_factory=dict)
    outcomes: dict[tuple[str, int, str], int] = field(default_factory=dict)
    rules: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict)  # of rule_findings_count
    repeats: Repeats = field(default_factory=Repeats)

    def add(
        self, judged: Judged, endpoint: int, releases: Releases, differences: Found, noise: Found
    ) -> None:
        self._count_endpoint((endpoint, *releases), judged.judgement)
        key = (judged.service, judged.day, judged.outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        for finding, shown in differences.items():
            counts = self._count((finding, *releases), shown[0], judged.at)
            counts["count"] += 1
            leaning = lean(shown[0])
            counts["new_greater"] += leaning > 0
            counts["new_smaller"] += leaning < 0
            counts["shape_explained"] += explained(shown, judged.at / 1000)
            apart = far(shown[0])
            counts["magnitude_up"] += apart > 0
            counts["magnitude_down"] += apart < 0
            for name, value in self.repeats.turn(finding, shown[0])._asdict().items():
                counts[name] += value
        for finding, shown in noise.items():
            counts = self._count((finding, *releases), shown[0], judged.at)
            counts["baseline_count"] += 1
            apart = far(shown[0])
            counts["baseline_magnitude_up"] += apart > 0
            counts["baseline_magnitude_down"] += apart < 0

    def hide(self, judged: Judged, releases: Releases, hidden: Hidden, noise: Hidden) -> None:
        """What rules explain counts for the rule, and not for the finding."""
        for finding, (rule, shown) in hidden.items():
            counts = self._hidden(rule, (finding, *releases))
            leaning = lean(shown[0])
            counts["count"] += 1
            counts["new_greater"] += leaning > 0
            counts["new_smaller"] += leaning < 0
            counts["shape_explained"] += explained(shown, judged.at / 1000)
        for finding, (rule, _) in noise.items():
            self._hidden(rule, (finding, *releases))["baseline_count"] += 1

    def _hidden(self, rule: int, key: Key) -> dict[str, int]:
        return self.rules.setdefault(
            (rule, *key), {"rule_id": rule, **_named(key), **dict.fromkeys(COUNTERS, 0)}
        )

    def _count_endpoint(self, key: Key, judgement: Judgement) -> None:
        compared = judgement.outcome in COMPARED
        if compared or judgement.baseline_compared:
            counts = self.endpoints.get(key)
            if counts is None:
                counts = self.endpoints[key] = {**_named(key), "compared": 0, "baseline_compared": 0}
            counts["compared"] += compared
            counts["baseline_compared"] += judgement.baseline_compared

    def _count(self, key: Key, difference: Difference, at: int) -> dict[str, Any]:
        found = self.findings.get(key)
        if found is None:
            found = self.findings[key] = {
                **_named(key),
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
                "first_ms": at,
                "last_ms": at,
            }
        if SEVERITY[difference.impact] > SEVERITY[found["impact"]]:
            found["impact"] = difference.impact
        found["first_ms"] = min(found["first_ms"], at)
        found["last_ms"] = max(found["last_ms"], at)
        return found

    def tally(self) -> list[dict[str, Any]]:
        return [
            {"service": service, "day": day, "outcome": outcome, "pairs": pairs}
            for (service, day, outcome), pairs in self.outcomes.items()
        ]


def _named(key: Key) -> dict[str, int]:
    return {"id": key[0], "old_release": key[1], "new_release": key[2]}
