"""Decides which findings are real and which are noise, from the ledger's counters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from abreast_sidecar.compare.noise import Counts, Decision, decide
from abreast_sidecar.store.clean import json_text
from abreast_sidecar.store.database import Connection, Row, statement

LOCK = 0x616272657006
ALPHA = 0.01  # of one endpoint, over all its life: any false finding
REASON_LIMIT = 300  # characters


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
        await connection.execute(statement("noise_put"), {"given": json_text(changed).decode()})
    if done:
        await connection.execute(statement("endpoints_lock"), {"ids": [one["id"] for one in done]})
        await connection.execute(statement("noise_done"), {"given": json_text(done).decode()})


def changes(rows: Sequence[Row]) -> list[dict[str, object]]:
    """What one endpoint's findings have to be told."""
    decided = zip(rows, decide(counts(rows), ALPHA), strict=True)
    return [
        {"id": row["id"], "state": decision.state, "reason": _reason(decision)}
        for row, decision in decided
        if (row["state"], row["reason"]) != (decision.state, _reason(decision))
    ]


def counts(rows: Iterable[Row]) -> list[Counts]:
    """Of one endpoint's findings. The lean is that of all that chance might have drawn instead: a field is as often
    added as removed, a status as often the one as the other.
    """
    rows = list(rows)
    greater: Counter[tuple[str, ...]] = Counter()
    smaller: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        greater[_drawn(row)] += row["new_greater"]
        smaller[_drawn(row)] += row["new_smaller"]
    return [
        Counts(
            compared=max(row["compared"], row["count"]),
            differs=row["count"],
            baseline_compared=max(row["baseline_compared"], row["baseline_count"]),
            baseline_differs=row["baseline_count"],
            explained=row["explained"],
            new_greater=greater[_drawn(row)],
            new_smaller=smaller[_drawn(row)],
        )
        for row in rows
    ]


def _drawn(row: Row) -> tuple[str, ...]:
    if row["part"] == "status":
        return ("status", *sorted(row["path"].split("->")))
    return (row["part"], row["path"], "presence" if row["kind"] in {"added", "removed"} else row["kind"])


def _reason(decision: Decision) -> str:
    return decision.reason[:REASON_LIMIT]


def _held_against(row: Row) -> dict[str, object]:
    return {"compared": row["compared"], "baseline_compared": row["baseline_compared"]}
