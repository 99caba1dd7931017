"""Decides which findings are real and which are noise, from the ledger's counters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from abreast_sidecar.stats.noise import DifferenceCounts, MagnitudeShift, NoiseDecision, classify_differences
from abreast_sidecar.store.database import Connection, Row, load_statement, to_json

NOISE_LOCK_KEY = 0x616272657006
FALSE_FINDING_RATE = 0.01  # of one endpoint, over all its life: any false finding
MAX_REASON_CHARS = 300  # characters
MIN_RELEASE_PAIRS = 500  # pairs, or copies to old, of one release to go by them alone
STATE_SEVERITY = {"noise": 0, "undecided": 1, "real": 2}
COUNT_COLUMNS = (
    "compared",
    "count",
    "baseline_compared",
    "baseline_count",
    "shape_explained",
    "new_greater",
    "new_smaller",
    "repeat_checks",
    "old_repeats",
    "new_repeats",
    "magnitude_up",
    "magnitude_down",
    "baseline_magnitude_up",
    "baseline_magnitude_down",
)
BASELINE_COLUMNS = ("baseline_compared", "baseline_count", "baseline_magnitude_up", "baseline_magnitude_down")
MAX_OLD_REPEAT_SHARE = 0.02  # of old's turns: where old says the same again more often, its values are not fresh


async def classify_findings(connection: Connection) -> int:
    """Return how many findings have another state or reason now. Any number may do it at once; one does."""
    async with connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": NOISE_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        cursor = await connection.execute(load_statement("noise_due"))
        updates, endpoints = [], []
        for _, group in groupby(await cursor.fetchall(), key=lambda row: row["endpoint"]):
            rows = list(group)
            findings = [row for row in rows if row["id"] is not None]
            updates += await asyncio.to_thread(find_changes, findings)  # others on the loop have their turn
            endpoints.append({"id": rows[0]["endpoint"], **_count_baseline(rows[0])})
        await _write_updates(connection, updates, endpoints)
        return len(updates)


async def _write_updates(
    connection: Connection, updates: list[dict[str, object]], endpoints: list[dict[str, object]]
) -> None:
    """Locks in the order of the ledger's writers: findings by id, endpoints by id."""
    if updates:
        await connection.execute(load_statement("findings_lock"), {"ids": [record["id"] for record in updates]})
        await connection.execute(load_statement("noise_set"), {"rows": to_json(updates).decode()})
    if endpoints:
        await connection.execute(load_statement("endpoints_lock"), {"ids": [record["id"] for record in endpoints]})
        await connection.execute(load_statement("noise_done"), {"rows": to_json(endpoints).decode()})


def find_changes(rows: Sequence[Row]) -> list[dict[str, object]]:
    """What one endpoint's findings have to be told."""
    pairs = zip(rows, classify_rows(rows), strict=True)
    return [
        {"id": row["id"], "state": decision.state, "reason": _limit_reason(decision)}
        for row, decision in pairs
        if (row["state"], row["reason"]) != (decision.state, _limit_reason(decision))
    ]


def classify_rows(rows: Sequence[Row]) -> list[NoiseDecision]:
    """Each finding is looked at twice, over all releases and in the newest that shows it: what begins in one release is
    not diluted by those before, and what took many small releases to show is seen as well. Both looks of all findings
    share the error probability.
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
    """Whether new says the same again more often than old does."""
    return DifferenceCounts(
        compared=row["repeat_checks"],
        differing=row["new_repeats"],
        baseline_compared=row["repeat_checks"],
        baseline_differing=row["old_repeats"],
    )


def _build_magnitude_shift(row: Row) -> MagnitudeShift:
    """Whether new's number is another one by much, and mostly to one side."""
    return MagnitudeShift(
        compared=max(row["compared"], row["count"]),
        far_greater=min(row["magnitude_up"], row["count"]),
        far_smaller=min(row["magnitude_down"], row["count"]),
        baseline_compared=max(row["baseline_compared"], row["baseline_count"]),
        baseline_far_greater=row["baseline_magnitude_up"],
        baseline_far_smaller=row["baseline_magnitude_down"],
    )


def _choose_stronger(
    row: Row, decision: NoiseDecision, repeat_decision: NoiseDecision, shift_decision: NoiseDecision | None
) -> NoiseDecision:
    """What differs as often as noise is none where new's number is far from old's to one side, or where new says the same
    over and over, and old never does.
    """
    if decision.state == "real":
        return decision
    if shift_decision is not None and shift_decision.state == "real":
        return shift_decision
    if repeat_decision.state != "real" or row["old_repeats"] > MAX_OLD_REPEAT_SHARE * row["repeat_checks"]:
        return decision
    comparison = (
        f"new says the same again in {row['new_repeats']} of {row['repeat_checks']} turns, old in {row['old_repeats']}"
    )
    return replace(repeat_decision, reason=f"{comparison}: more than chance")


def _has_former_release(row: Row) -> bool:
    """Whether the newest release's counts are not simply all of them."""
    return row["newest_count"] is not None and any(
        row[name] != _select_newest_release(row)[name] for name in COUNT_COLUMNS
    )


def _select_newest_release(row: Row) -> Row:
    """The same finding in its newest release. Old's former releases stand in until there are enough copies to this one."""
    counts_of_newest = {name: row[f"newest_{name}"] for name in COUNT_COLUMNS}
    if counts_of_newest["baseline_compared"] < MIN_RELEASE_PAIRS:
        counts_of_newest |= {name: row[name] for name in BASELINE_COLUMNS}
    return {**row, **counts_of_newest, "releases": (row["old_release"], row["new_release"])}


def _merge_views(overall: NoiseDecision, newest: NoiseDecision, row: Row) -> NoiseDecision:
    """The graver of both looks holds, unless the newest release has enough pairs to show that it is no more than noise."""
    is_settled = newest.state == "noise" and row["newest_compared"] >= MIN_RELEASE_PAIRS
    if STATE_SEVERITY[overall.state] > STATE_SEVERITY[newest.state] and not is_settled:
        return overall
    label = f" in release {row['newest_label']}" if row["newest_label"] else " in the newest release"
    return replace(newest, reason=f"{newest.reason}{label}")


def build_counts(rows: Iterable[Row]) -> list[DifferenceCounts]:
    """Of one endpoint's findings. The lean is that of all that chance might have drawn instead: a field is as often
    added as removed, a status as often the one as the other.
    """
    rows = list(rows)
    greater: Counter[tuple[object, ...]] = Counter()
    smaller: Counter[tuple[object, ...]] = Counter()
    for row in rows:
        greater[_make_direction_key(row)] += row["new_greater"]
        smaller[_make_direction_key(row)] += row["new_smaller"]
    return [
        DifferenceCounts(
            compared=max(row["compared"], row["count"]),
            differing=row["count"],
            baseline_compared=max(row["baseline_compared"], row["baseline_count"]),
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


def _limit_reason(decision: NoiseDecision) -> str:
    return decision.reason[:MAX_REASON_CHARS]


def _count_baseline(row: Row) -> dict[str, object]:
    return {"compared": row["compared"], "baseline_compared": row["baseline_compared"]}
