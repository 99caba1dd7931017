"""Classifies findings as real or noise from the ledger's counters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from abreast_sidecar.stats.noise import DifferenceCounts, MagnitudeShift, NoiseDecision, classify_differences
from abreast_sidecar.store.counters import COUNTERS
from abreast_sidecar.store.database import AdvisoryLock, Connection, Row, exclusive, fetch_rows, load_statement, to_json

FALSE_FINDING_RATE = 0.01  # probability that an endpoint ever shows a false finding
MAX_REASON_CHARS = 300
MIN_RELEASE_PAIRS = 500  # enough for one release to decide alone; also for baseline pairs
STATE_SEVERITY = {"noise": 0, "undecided": 1, "real": 2}
COUNT_COLUMNS = ("compared", "baseline_compared", *COUNTERS)
BASELINE_COLUMNS = ("baseline_compared", "baseline_count", "baseline_magnitude_up", "baseline_magnitude_down")
MAX_OLD_REPEAT_SHARE = 0.02  # share of pairs; above it, old's values are not unique, and repeats of new prove nothing


@exclusive(AdvisoryLock.NOISE, otherwise=0)
async def classify_findings(connection: Connection) -> int:
    """Classify the findings of endpoints with new counts. Return how many states and reasons changed."""
    updates, endpoints = [], []
    for _, group in groupby(await fetch_rows(connection, "noise_due"), key=lambda row: row["endpoint"]):
        rows = list(group)
        findings = [row for row in rows if row["id"] is not None]
        updates += await asyncio.to_thread(find_changes, findings)
        counts = {name: rows[0][name] for name in ("compared", "baseline_compared")}
        endpoints.append({"id": rows[0]["endpoint"], **counts})
    # Locks in the order of the ledger's writers: findings by id, endpoints by id.
    if updates:
        await connection.execute(load_statement("findings_lock"), {"ids": [row["id"] for row in updates]})
        await connection.execute(load_statement("noise_set"), {"rows": to_json(updates).decode()})
    if endpoints:
        await connection.execute(load_statement("endpoints_lock"), {"ids": [row["id"] for row in endpoints]})
        await connection.execute(load_statement("noise_done"), {"rows": to_json(endpoints).decode()})
    return len(updates)


def find_changes(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return the findings of one endpoint whose state or reason changes."""
    decisions = [
        (row, decision.state, decision.reason[:MAX_REASON_CHARS])
        for row, decision in zip(rows, classify_rows(rows), strict=True)
    ]
    return [
        {"id": row["id"], "state": state, "reason": reason}
        for row, state, reason in decisions
        if (row["state"], row["reason"]) != (state, reason)
    ]


def classify_rows(rows: Sequence[Row]) -> list[NoiseDecision]:
    """Classify the findings of one endpoint.

    Each finding has two views: all releases, and the newest release that shows it. So earlier releases don't dilute a
    finding of the newest one, and many small releases add up. All views of all findings share the error probability.
    """
    with_former = [row for row in rows if _has_former_release(row)]
    views = [*rows, *map(_select_newest_release, with_former)]
    inputs = [*build_counts(rows), *build_counts(views[len(rows) :]), *map(_build_repeat_counts, views)]
    shifts = {
        index: _build_magnitude_shift(row)
        for index, row in enumerate(views)
        if row["magnitude_up"] or row["magnitude_down"]
    }
    results, view_count = classify_differences([*inputs, *shifts.values()], FALSE_FINDING_RATE), len(views)
    shift_results = dict(zip(shifts, results[2 * view_count :], strict=True))
    candidates = zip(views, results[:view_count], results[view_count : 2 * view_count], strict=True)
    combined = [
        _choose_stronger(row, decision_of_counts, repeat_decision, shift_results.get(index))
        for index, (row, decision_of_counts, repeat_decision) in enumerate(candidates)
    ]
    newest_decisions = dict(zip((row["id"] for row in with_former), combined[len(rows) :], strict=True))
    return [
        _merge_views(decision, newest_decisions[row["id"]], row) if row["id"] in newest_decisions else decision
        for row, decision in zip(rows, combined, strict=False)
    ]


def _build_repeat_counts(row: Row) -> DifferenceCounts:
    """Compare how often new and old repeat one of their recent values."""
    return DifferenceCounts(
        compared=row["repeat_checks"],
        differing=row["new_repeats"],
        baseline_compared=row["repeat_checks"],
        baseline_differing=row["old_repeats"],
    )


def _build_magnitude_shift(row: Row) -> MagnitudeShift:
    """Count how often new's number is more than twice old's, or less than half."""
    return MagnitudeShift(
        compared=row["compared"],
        far_greater=row["magnitude_up"],
        far_smaller=row["magnitude_down"],
        baseline_compared=row["baseline_compared"],
        baseline_far_greater=row["baseline_magnitude_up"],
        baseline_far_smaller=row["baseline_magnitude_down"],
    )


def _choose_stronger(
    row: Row, decision: NoiseDecision, repeat_decision: NoiseDecision, shift_decision: NoiseDecision | None
) -> NoiseDecision:
    """Return the decision with the strongest evidence for a real finding.

    A value that differs as often as noise is still real if new's numbers move to one side, or if new repeats values and
    old doesn't.
    """
    if decision.state == "real":
        return decision
    if shift_decision is not None and shift_decision.state == "real":
        return shift_decision
    if repeat_decision.state != "real" or row["old_repeats"] > MAX_OLD_REPEAT_SHARE * row["repeat_checks"]:
        return decision
    repeats = (
        f"new repeats a value in {row['new_repeats']} of {row['repeat_checks']} pairs, old in {row['old_repeats']}"
    )
    return replace(repeat_decision, reason=f"{repeats}: more than chance")


def _has_former_release(row: Row) -> bool:
    """Check whether the newest release has only a part of the counts."""
    return row["newest_count"] is not None and any(
        row[name] != _select_newest_release(row)[name] for name in COUNT_COLUMNS
    )


def _select_newest_release(row: Row) -> Row:
    """Return the row with the counts of the newest release, but with all baseline pairs while the release has few."""
    counts_of_newest = {name: row[f"newest_{name}"] for name in COUNT_COLUMNS}
    if counts_of_newest["baseline_compared"] < MIN_RELEASE_PAIRS:
        counts_of_newest |= {name: row[name] for name in BASELINE_COLUMNS}
    return {**row, **counts_of_newest, "releases": (row["old_release"], row["new_release"])}


def _merge_views(overall: NoiseDecision, newest: NoiseDecision, row: Row) -> NoiseDecision:
    """Return the more severe decision, unless the newest release has enough pairs to prove noise."""
    is_settled = newest.state == "noise" and row["newest_compared"] >= MIN_RELEASE_PAIRS
    if STATE_SEVERITY[overall.state] > STATE_SEVERITY[newest.state] and not is_settled:
        return overall
    label = f" in release {row['newest_label']}" if row["newest_label"] else " in the newest release"
    return replace(newest, reason=f"{newest.reason}{label}")


def build_counts(rows: Iterable[Row]) -> list[DifferenceCounts]:
    """Return the counts of one endpoint's findings.

    Directions are summed over findings that are each other's reverse: by chance, a field is added as often as removed.
    """
    rows = list(rows)
    greater: Counter[tuple[object, ...]] = Counter()
    smaller: Counter[tuple[object, ...]] = Counter()
    for row in rows:
        greater[_make_direction_key(row)] += row["new_greater"]
        smaller[_make_direction_key(row)] += row["new_smaller"]
    return [
        DifferenceCounts(
            compared=row["compared"],
            differing=row["count"],
            baseline_compared=row["baseline_compared"],
            baseline_differing=row["baseline_count"],
            explained=row["shape_explained"],
            is_rare=row["kind"] in {"format", "range"},
            new_greater=greater[_make_direction_key(row)],
            new_smaller=smaller[_make_direction_key(row)],
        )
        for row in rows
    ]


def _make_direction_key(row: Row) -> tuple[object, ...]:
    releases = row.get("releases", ())
    if row["part"] == "status":
        return (releases, "status", *sorted(row["path"].split("->")))
    kind = "presence" if row["kind"] in {"added", "removed"} else row["kind"]
    return (releases, row["part"], row["path"], kind)
