"""What a batch adds to the counters, made only from the pairs that were new."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abreast_sidecar.compare import Difference
from abreast_sidecar.store.judged import Judged

SEVERITY = {"additive": 0, "value": 1, "breaking": 2}


@dataclass(slots=True)
class Rollup:
    """`findings` has parameters of findings_count.sql by finding, `outcomes` pairs by service, day and outcome."""

    findings: dict[int, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[tuple[str, int, str], int] = field(default_factory=dict)

    def add(self, judged: Judged, differences: dict[int, Difference], noise: dict[int, Difference]) -> None:
        key = (judged.service, judged.day, judged.judgement.outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        for finding, difference in differences.items():
            self._count(finding, difference, judged.at)["count"] += 1
        for finding, difference in noise.items():
            self._count(finding, difference, judged.at)["baseline_count"] += 1

    def _count(self, finding: int, difference: Difference, at: int) -> dict[str, Any]:
        found = self.findings.get(finding)
        if found is None:
            found = self.findings[finding] = {
                "id": finding,
                "count": 0,
                "baseline_count": 0,
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
