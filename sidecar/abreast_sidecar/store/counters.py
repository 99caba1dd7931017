"""Counters of findings, endpoints and outcomes. Batches, reapplied rules and rechecks all change them through here.

A pair stores its marks: the counters, other than the counts of pairs, that it adds to for each finding. So a pair can
move between a finding and a rule with everything that it counts, even after its example is gone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from psycopg import AsyncConnection

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.model import COMPARED_OUTCOMES, ComparisonResult, Difference
from abreast_sidecar.compare.volatile import are_write_times, compare_values, get_direction, is_explained_by_shape
from abreast_sidecar.store.database import execute, to_json
from abreast_sidecar.store.records import met_equal_loads

NUMBERED_PAIR_ID = re.compile(
    "([0-9a-f]{8}-[0-9a-f])([0-9a-f]{3})-8([0-9a-f]{3})-[0-9a-f]{4}-[0-9a-f]{12}"
)  # stream and both halves of the number
NO_RULE = 0  # in place of a rule: no rule explains the finding
IMPACT_SEVERITY = {"additive": 0, "value": 1, "breaking": 2}
MARKS = {
    "shape_explained": 1,
    "copy_greater_of_new": 2,
    "copy_smaller_of_new": 4,
    "repeat_checks": 8,
    "old_repeats": 16,
    "new_repeats": 32,
    "other_above": 64,
    "other_below": 128,
    "same_above": 256,
    "same_below": 512,
    "other_only": 1024,
    "same_only": 2048,
    "copy_greater_of_old": 4096,
    "copy_smaller_of_old": 8192,
    "same_rises": 16384,
    "same_falls": 32768,
}
CHANGE_MARKS = MARKS["same_rises"] | MARKS["same_falls"]
BASELINE_MARKS = MARKS["same_above"] | MARKS["same_below"] | MARKS["same_only"] | CHANGE_MARKS
TRIPLE_MARKS = BASELINE_MARKS | MARKS["other_above"] | MARKS["other_below"] | MARKS["other_only"]
DIRECTION_MARKS = sum(mark for name, mark in MARKS.items() if name.startswith("copy_"))
BET_MARKS = TRIPLE_MARKS | DIRECTION_MARKS
SIGN_MARKS = MARKS["other_only"] | MARKS["same_only"]
# A client bets once in each.
BET_GROUPS = (SIGN_MARKS, TRIPLE_MARKS & ~SIGN_MARKS & ~CHANGE_MARKS, DIRECTION_MARKS, CHANGE_MARKS)
REPEAT_MARKS = MARKS["repeat_checks"] | MARKS["old_repeats"] | MARKS["new_repeats"]
COUNTERS = ("count", "baseline_count", *MARKS)
EMPTY_COUNTS = dict.fromkeys((*COUNTERS, "unknown", "drift_count"), 0)

FindingCounterKey = tuple[int, int, int, int]  # rule or NO_RULE, finding, release of old, release of new
EndpointCounterKey = tuple[int, int, int]  # endpoint, release of old, release of new
PairCounter = Literal["count", "baseline_count"]


def compute_marks(
    result: ComparisonResult,
    differences: Sequence[Difference],
    noise: Sequence[Difference],
    time_s: float,
    *,
    copies_writes: bool,
) -> int:
    """Return the marks of one finding in a pair, without REPEAT_MARKS.

    `differences`: those of old and new; `noise`: those of the live response and a copy of the same version.
    `copies_writes`: Envoy also copies unsafe requests of the service, so that each version may write to its own store.
    """
    marks = 0
    is_written = bool(differences or noise) and copies_writes and are_write_times((*differences, *noise), time_s)
    if differences:
        is_explained = is_written or is_explained_by_shape(differences, time_s)
        marks = MARKS["shape_explained"] if is_explained else _compute_direction_marks(result, differences[0])
    if not is_triple(result) or is_written:
        return marks
    if not noise:
        marks |= MARKS["other_only"]
    elif not differences:
        marks |= MARKS["same_only"]
    old, new, baseline = (
        capture.started_at if capture else 0.0 for capture in (result.old, result.new, result.baseline)
    )
    other = compare_values(differences, (old, new))
    same = compare_values(noise, (baseline, new) if _is_live(result.new) else (old, baseline))
    if same:
        marks |= _choose_mark(-same if _is_live(result.new) else same, "same_rises", "same_falls")
    if other is None or same is None or other == same:
        return marks
    live, other_copy = _get_live_and_other(result)
    if not (live and other_copy and result.baseline and met_equal_loads(other_copy, result.baseline, live=live)):
        return marks  # a value such as a duration depends on the load
    if other:
        return marks | _choose_mark(other, "other_above", "other_below")
    return marks | _choose_mark(same, "same_above", "same_below")


def is_triple(result: ComparisonResult) -> bool:
    """Check that both copies of a request were compared with its live response."""
    live, other = _get_live_and_other(result)
    is_compared = result.baseline_compared and result.outcome in COMPARED_OUTCOMES
    return (
        is_compared and _is_live(live) and not _is_live(other) and _get_version(live) == _get_version(result.baseline)
    )


def _compute_direction_marks(result: ComparisonResult, difference: Difference) -> int:
    direction = get_direction(difference)
    if not (result.old and result.new and met_equal_loads(result.old, result.new)):
        return 0
    if _is_live(result.new):
        return _choose_mark(-direction, "copy_greater_of_old", "copy_smaller_of_old")
    return _choose_mark(direction, "copy_greater_of_new", "copy_smaller_of_new")


def _get_live_and_other(result: ComparisonResult) -> tuple[Capture | None, Capture | None]:
    return (result.new, result.old) if _is_live(result.new) else (result.old, result.new)


def _is_live(capture: Capture | None) -> bool:
    return capture is not None and capture.role == "live"


def _get_version(capture: Capture | None) -> str:
    return capture.version if capture else ""


def _choose_mark(direction: int, positive: str, negative: str) -> int:
    return MARKS[positive] if direction > 0 else MARKS[negative] if direction else 0


def get_rule(differences: Sequence[Difference]) -> int:
    """Return the rule that explains the differences of a finding, or NO_RULE."""
    return int(differences[0].explained_by or NO_RULE)


@dataclass(slots=True)
class CounterDeltas:
    """Changes of counters, collected over the pairs of one transaction."""

    findings: dict[FindingCounterKey, dict[str, Any]] = field(default_factory=dict)
    endpoints: dict[EndpointCounterKey, dict[str, int]] = field(default_factory=dict)
    outcomes: Counter[tuple[str, int, str]] = field(default_factory=Counter)  # by service, day and outcome
    streams: dict[tuple[str, str], int] = field(default_factory=dict)  # highest number by service and stream

    def add_pair(self, service: str, day: int, outcome: str, pair_id: str) -> None:
        self.outcomes[service, day, outcome] += 1
        if match := NUMBERED_PAIR_ID.fullmatch(pair_id):
            key, number = (service, match[1]), int(match[2] + match[3], 16)
            self.streams[key] = max(self.streams.get(key, 0), number)

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
            columns = dict(zip(("rule_id", "finding_id", "old_release", "new_release"), key, strict=True))
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
        """Lock the findings and add to their counters, by rule and release, and to their totals.

        Return the findings that changed.
        """
        rows = [
            {**counts, "first_seen": _format_time(counts["first_ms"]), "last_seen": _format_time(counts["last_ms"])}
            for counts in self.findings.values()
            if any(counts[name] for name in EMPTY_COUNTS)
        ]
        if rows:
            await execute(connection, "findings_count", {"rows": to_json(rows)})
        return {row["finding_id"] for row in rows}

    async def write_pairs(self, connection: AsyncConnection[Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Add to the counters of outcomes, streams and endpoints, and store the samples, in one statement."""
        outcomes = [
            {"service": service, "day": day, "outcome": outcome, "pairs": pairs}
            for (service, day, outcome), pairs in self.outcomes.items()
            if pairs
        ]
        streams = [
            {"service": service, "stream": stream, "highest": highest}
            for (service, stream), highest in self.streams.items()
        ]
        rows = {
            "outcomes": outcomes,
            "streams": streams,
            "endpoints": list(self.endpoints.values()),
            "samples": samples,
        }
        if any(rows.values()):
            parameters = {name: to_json(values) if values else None for name, values in rows.items()}
            await execute(connection, "pairs_count", parameters)


def _format_time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat()
