"""Classifies findings as real or noise from the ledger's counters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from math import pi

from abreast_sidecar.stats.noise import (
    DifferenceCounts,
    NoiseDecision,
    OrderCounts,
    classify_differences,
    has_begun_later,
)
from abreast_sidecar.store.counters import COUNTERS, MARKS
from abreast_sidecar.store.database import AdvisoryLock, Connection, Row, exclusive, execute, fetch_rows, to_json
from abreast_sidecar.store.records import from_row
from abreast_sidecar.store.samples import FEW_PAIRS

# Probability that a service without a change ever shows a false finding: from all releases, and from each release alone.
FALSE_FINDING_RATE = 0.01
FALSE_RELEASE_FINDING_RATE = 0.01
MAX_REASON_CHARS = 300
MIN_RELEASE_PAIRS = 500  # enough for one release to show that a finding is noise
STATE_SEVERITY = {"noise": 0, "undecided": 1, "real": 2}
DIFFERENCE_SHARE, REPEAT_SHARE, ORDER_SHARE = 0.8, 0.1, 0.1  # parts of an error probability for the three tests
DIRECTION_COLUMNS = tuple(name for name in MARKS if name.startswith("copy_"))
COUNT_COLUMNS = ("compared", "baseline_compared", *COUNTERS)
MAX_STORED_PAIRS = 50  # before and after the first pair with a finding
STORED_REASON = (
    "it began after requests that write, so the stores of both versions may differ; compare the stores, let both versions"
    " use one, or confirm the finding"
)
MAX_OLD_REPEAT_SHARE = 0.02  # share of pairs; above it, old's values are not unique, and repeats of new prove nothing

Place = tuple[str, str, str]  # part, path and kind


@exclusive(AdvisoryLock.NOISE, otherwise=0)
async def classify_findings(connection: Connection) -> int:
    """Classify the findings of endpoints with new counts. Return how many states and reasons changed."""
    updates = []
    due_rows = await fetch_rows(connection, "noise_due", {"few": FEW_PAIRS})
    stored = await find_stored_differences(connection, due_rows)
    for _, group in groupby(due_rows, key=lambda row: row["pool"]):
        updates += await asyncio.to_thread(find_changes, list(group), stored)
    endpoints = [
        {"id": row["endpoint"], "compared": row["compared"], "baseline_compared": row["baseline_compared"]}
        for row in {row["endpoint"]: row for row in due_rows}.values()
    ]
    # Locks in the order of the ledger's writers: findings by id, endpoints by id.
    if updates:
        await execute(connection, "findings_lock", {"ids": [row["id"] for row in updates]})
        await execute(connection, "noise_set", {"rows": to_json(updates)})
    if endpoints:
        await execute(connection, "endpoints_lock", {"ids": [row["id"] for row in endpoints]})
        await execute(connection, "noise_done", {"rows": to_json(endpoints)})
    return len(updates)


async def find_stored_differences(connection: Connection, rows: Iterable[Row]) -> frozenset[int]:
    """Return the findings that began after a write, so that they may show what the stores of both versions contain.

    If Envoy copies writes to separate stores, two writes can arrive in opposite orders. The stores then differ from that
    moment on, in values and in rows.
    """
    ids = [row["id"] for row in rows if row["id"] is not None and _is_of_stored_value(row)]
    if not ids:
        return frozenset()
    counts = await fetch_rows(connection, "findings_after_writes", {"ids": ids, "limit": MAX_STORED_PAIRS})
    return frozenset(row["id"] for row in counts if has_begun_later(row["earlier"], row["later"], row["showing"]))


def _is_of_stored_value(row: Row) -> bool:
    is_value = row["kind"] == "changed" or (row["kind"] in {"added", "removed"} and row["path"].endswith("[*]"))
    return bool(row["count"] and row["part"] == "body" and is_value and row["other_only"] > row["same_only"])


def find_changes(rows: Sequence[Row], stored: frozenset[int] = frozenset()) -> list[dict[str, object]]:
    """Return the findings of one pool of endpoints whose state or reason changes. `stored`: may be of the stores."""
    rows_by_place = pool_rows(rows)
    decisions = dict(zip(rows_by_place, classify_rows(list(rows_by_place.values())), strict=True))
    endpoint_count = len({row["endpoint"] for row in rows})
    pool_text = f"; {endpoint_count:,} endpoints with few requests count together" if endpoint_count > 1 else ""
    changes: list[dict[str, object]] = []
    for row in rows:
        if row["id"] is None:
            continue
        decision = decisions[_get_place(row)]
        state, reason = decision.state, f"{decision.reason}{pool_text}"[:MAX_REASON_CHARS]
        if state == "real" and row["id"] in stored:
            state, reason = "undecided", STORED_REASON
        if (row["state"], row["reason"]) != (state, reason):
            changes.append({"id": row["id"], "state": state, "reason": reason})
    return changes


def pool_rows(rows: Sequence[Row]) -> dict[Place, Row]:
    """Return one row per place of a pool of endpoints, with the counts of all its endpoints.

    The view of one release is left out of a sum: only the endpoints that show a finding have its release. A client has
    one bet for all endpoints of a pool (`store.writer`), so sums of bets count it once.
    """
    endpoints = {row["endpoint"]: row for row in rows}
    findings = [row for row in rows if row["id"] is not None]
    if len(endpoints) == 1:
        return {_get_place(row): row for row in findings}
    totals = {name: sum(row[name] for row in endpoints.values()) for name in ("compared", "baseline_compared")}
    pool: dict[Place, Row] = {}
    for row in findings:
        place = _get_place(row)
        sums = pool.setdefault(place, {**row, **totals, **dict.fromkeys(COUNTERS, 0), "newest_count": None})
        for name in COUNTERS:
            sums[name] += row[name]
    return pool


def _get_place(row: Row) -> Place:
    return row["part"], row["path"], row["kind"]


def classify_rows(rows: Sequence[Row]) -> list[NoiseDecision]:
    """Classify the findings of one endpoint.

    Each finding has two views: all releases, and the newest release that shows it. So earlier releases don't dilute a
    finding of the newest one, and many small releases add up. Each view shares its error probability among all findings
    of the service, and the releases share theirs: release r gets 6/(pi r)^2 of it.
    """
    if not rows:
        return []
    places = rows[0]["places"]
    combined = _classify_view(rows, FALSE_FINDING_RATE, places)
    with_former = [row for row in rows if _has_former_release(row)]
    newest_decisions: dict[int, NoiseDecision] = {}
    for number, group in groupby(sorted(with_former, key=_get_release_number), key=_get_release_number):
        views = [_select_newest_release(row) for row in group]
        alpha = FALSE_RELEASE_FINDING_RATE * 6 / (pi * max(number, 1)) ** 2
        decisions = _classify_view(views, alpha, places)
        newest_decisions |= {row["id"]: decision for row, decision in zip(views, decisions, strict=True)}
    return [
        _merge_views(decision, newest_decisions[row["id"]], row) if row["id"] in newest_decisions else decision
        for row, decision in zip(rows, combined, strict=True)
    ]


def _get_release_number(row: Row) -> int:
    return int(row["release_number"] or 1)


def _classify_view(views: Sequence[Row], alpha: float, places: int) -> list[NoiseDecision]:
    differences, repeats, orders = (
        classify_differences(counts, share * alpha, places)
        for counts, share in (
            (build_counts(views), DIFFERENCE_SHARE),
            ([_build_repeat_counts(row) for row in views], REPEAT_SHARE),
            ([from_row(OrderCounts, row) for row in views], ORDER_SHARE),
        )
    )
    return [_choose_stronger(*candidate) for candidate in zip(views, differences, repeats, orders, strict=True)]


def _build_repeat_counts(row: Row) -> DifferenceCounts:
    """Compare how often new and old repeat one of their recent values."""
    return DifferenceCounts(
        compared=row["repeat_checks"],
        differing=row["new_repeats"],
        baseline_compared=row["repeat_checks"],
        baseline_differing=row["old_repeats"],
        other_only=row["new_repeats"],
        same_only=row["old_repeats"],
    )


def _choose_stronger(
    row: Row, decision: NoiseDecision, repeat_decision: NoiseDecision, order_decision: NoiseDecision
) -> NoiseDecision:
    """Return the decision with the strongest evidence for a real finding.

    A value that differs as often as noise is still real if new's values lean to one side, or if new repeats values and old
    doesn't.
    """
    if decision.state == "real":
        return decision
    if order_decision.state == "real":
        return order_decision
    if repeat_decision.state != "real" or row["old_repeats"] > MAX_OLD_REPEAT_SHARE * row["repeat_checks"]:
        return decision
    repeats = (
        f"new repeats a value in {row['new_repeats']} of {row['repeat_checks']} pairs, old in {row['old_repeats']}"
    )
    return replace(repeat_decision, reason=f"{repeats}: more than chance")


def _has_former_release(row: Row) -> bool:
    """Check whether the newest release has only a part of the counts."""
    if row["newest_count"] is None:
        return False
    newest = _select_newest_release(row)
    return any(row[name] != newest[name] for name in COUNT_COLUMNS)


def _select_newest_release(row: Row) -> Row:
    """Return the row with the counts of the newest release."""
    counts_of_newest = {name: row[f"newest_{name}"] for name in COUNT_COLUMNS}
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
    directions: dict[str, Counter[tuple[object, ...]]] = {name: Counter() for name in DIRECTION_COLUMNS}
    for row in rows:
        for name, sums in directions.items():
            sums[_make_direction_key(row)] += row[name]
    return [
        DifferenceCounts(
            compared=row["compared"],
            differing=row["count"],
            baseline_compared=row["baseline_compared"],
            baseline_differing=row["baseline_count"],
            explained=row["shape_explained"],
            other_only=row["other_only"] if row["count"] else 0,  # retests made bets too
            same_only=row["same_only"],
            **{name: sums[_make_direction_key(row)] for name, sums in directions.items()},
        )
        for row in rows
    ]


def _make_direction_key(row: Row) -> tuple[object, ...]:
    releases = row.get("releases", ())
    if row["part"] == "status":
        return (releases, "status", *sorted(row["path"].split("->")))
    kind = "presence" if row["kind"] in {"added", "removed"} else row["kind"]
    return (releases, row["part"], row["path"], kind)
