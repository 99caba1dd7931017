"""Decides which findings are real and which are noise, from the ledger's counters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from abreast_sidecar.compare.noise import Counts, Decision, Far, decide
from abreast_sidecar.store.clean import json_text
from abreast_sidecar.store.database import Connection, Row, statement

LOCK = 0x616272657006
ALPHA = 0.01  # of one endpoint, over all its life: any false finding
REASON_LIMIT = 300  # characters
ENOUGH = 500  # pairs, or copies to old, of one release to go by them alone
GRAVITY = {"noise": 0, "undecided": 1, "real": 2}
COUNTS = (
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
COPIES = ("baseline_compared", "baseline_count", "baseline_magnitude_up", "baseline_magnitude_down")
FRESH = 0.02  # of old's turns: where old says the same again more often, its values are not fresh


async def decide_noise(connection: Connection) -> int:
    """Return how many findings have another state or reason now. Any number may do it at once; one does."""
    async with connection.transaction():
        cursor = await connection.execute(statement("lock_try"), {"lock": LOCK})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        cursor = await connection.execute(statement("noise_due"))
        changed, done = [], []
        for _, group in groupby(await cursor.fetchall(), key=lambda row: row["endpoint"]):
            rows = list(group)
            known = [row for row in rows if row["id"] is not None]
            changed += await asyncio.to_thread(changes, known)  # others on the loop have their turn
            done.append({"id": rows[0]["endpoint"], **_held_against(rows[0])})
        await _write(connection, changed, done)
        return len(changed)


async def _write(
    connection: Connection, changed: list[dict[str, object]], done: list[dict[str, object]]
) -> None:
    """Locks in the order of the ledger's writers: findings by id, endpoints by id."""
    if changed:
        await connection.execute(statement("findings_lock"), {"ids": [one["id"] for one in changed]})
        await connection.execute(statement("noise_set"), {"rows": json_text(changed).decode()})
    if done:
        await connection.execute(statement("endpoints_lock"), {"ids": [one["id"] for one in done]})
        await connection.execute(statement("noise_done"), {"rows": json_text(done).decode()})


def changes(rows: Sequence[Row]) -> list[dict[str, object]]:
    """What one endpoint's findings have to be told."""
    decided = zip(rows, decisions(rows), strict=True)
    return [
        {"id": row["id"], "state": decision.state, "reason": _reason(decision)}
        for row, decision in decided
        if (row["state"], row["reason"]) != (decision.state, _reason(decision))
    ]


def decisions(rows: Sequence[Row]) -> list[Decision]:
    """Each finding is looked at twice, over all releases and in the newest that shows it: what begins in one release is
    not diluted by those before, and what took many small releases to show is seen as well. Both looks of all findings
    share the error probability.
    """
    again = [row for row in rows if _has_former(row)]
    looks = [*rows, *map(_newest, again)]
    places = [*counts(rows), *counts(looks[len(rows) :]), *map(_turns, looks)]
    numbers = {
        place: _far(row) for place, row in enumerate(looks) if row["magnitude_up"] or row["magnitude_down"]
    }
    decided, many = decide([*places, *numbers.values()], ALPHA), len(looks)
    far = dict(zip(numbers, decided[2 * many :], strict=True))
    each = zip(looks, decided[:many], decided[many : 2 * many], strict=True)
    both = [_graver(row, one, stale, far.get(place)) for place, (row, one, stale) in enumerate(each)]
    latest = dict(zip((row["id"] for row in again), both[len(rows) :], strict=True))
    return [
        _together(decision, latest[row["id"]], row) if row["id"] in latest else decision
        for row, decision in zip(rows, both, strict=False)
    ]


def _turns(row: Row) -> Counts:
    """Whether new says the same again more often than old does."""
    return Counts(
        compared=row["repeat_checks"],
        differs=row["new_repeats"],
        baseline_compared=row["repeat_checks"],
        baseline_differs=row["old_repeats"],
    )


def _far(row: Row) -> Far:
    """Whether new's number is another one by much, and mostly to one side."""
    return Far(
        compared=max(row["compared"], row["count"]),
        more=min(row["magnitude_up"], row["count"]),
        less=min(row["magnitude_down"], row["count"]),
        baseline_compared=max(row["baseline_compared"], row["baseline_count"]),
        baseline_more=row["baseline_magnitude_up"],
        baseline_less=row["baseline_magnitude_down"],
    )


def _graver(row: Row, decision: Decision, stale: Decision, far: Decision | None) -> Decision:
    """What differs as often as noise is none where new's number is far from old's to one side, or where new says the same
    over and over, and old never does.
    """
    if decision.state == "real":
        return decision
    if far is not None and far.state == "real":
        return far
    if stale.state != "real" or row["old_repeats"] > FRESH * row["repeat_checks"]:
        return decision
    said = f"new says the same again in {row['new_repeats']} of {row['repeat_checks']} turns, old in {row['old_repeats']}"
    return replace(stale, reason=f"{said}: more than chance")


def _has_former(row: Row) -> bool:
    """Whether the newest release's counts are not simply all of them."""
    return row["newest_count"] is not None and any(row[name] != _newest(row)[name] for name in COUNTS)


def _newest(row: Row) -> Row:
    """The same finding in its newest release. Old's former releases stand in until there are enough copies to this one."""
    known = {name: row[f"newest_{name}"] for name in COUNTS}
    if known["baseline_compared"] < ENOUGH:
        known |= {name: row[name] for name in COPIES}
    return {**row, **known, "releases": (row["old_release"], row["new_release"])}


def _together(whole: Decision, newest: Decision, row: Row) -> Decision:
    """The graver of both looks holds, unless the newest release has enough pairs to show that it is no more than noise."""
    settled = newest.state == "noise" and row["newest_compared"] >= ENOUGH
    if GRAVITY[whole.state] > GRAVITY[newest.state] and not settled:
        return whole
    label = f" in release {row['newest_label']}" if row["newest_label"] else " in the newest release"
    return replace(newest, reason=f"{newest.reason}{label}")


def counts(rows: Iterable[Row]) -> list[Counts]:
    """Of one endpoint's findings. The lean is that of all that chance might have drawn instead: a field is as often
    added as removed, a status as often the one as the other.
    """
    rows = list(rows)
    greater: Counter[tuple[object, ...]] = Counter()
    smaller: Counter[tuple[object, ...]] = Counter()
    for row in rows:
        greater[_drawn(row)] += row["new_greater"]
        smaller[_drawn(row)] += row["new_smaller"]
    return [
        Counts(
            compared=max(row["compared"], row["count"]),
            differs=row["count"],
            baseline_compared=max(row["baseline_compared"], row["baseline_count"]),
            baseline_differs=row["baseline_count"],
            explained=row["shape_explained"],
            rare=row["kind"] in {"format", "range"},
            new_greater=greater[_drawn(row)],
            new_smaller=smaller[_drawn(row)],
        )
        for row in rows
    ]


def _drawn(row: Row) -> tuple[object, ...]:
    releases = row.get("releases", ())
    if row["part"] == "status":
        return (releases, "status", *sorted(row["path"].split("->")))
    kind = "presence" if row["kind"] in {"added", "removed"} else row["kind"]
    return (releases, row["part"], row["path"], kind)


def _reason(decision: Decision) -> str:
    return decision.reason[:REASON_LIMIT]


def _held_against(row: Row) -> dict[str, object]:
    return {"compared": row["compared"], "baseline_compared": row["baseline_compared"]}
