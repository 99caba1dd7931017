"""What asking again told: a finding that was drift is taken off its pair, and counts apart."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

from abreast_sidecar.compare import Difference
from abreast_sidecar.compare.evidence import explained, lean
from abreast_sidecar.store.catalogue import PATH_LIMIT
from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import Connection, Database, Row, statement
from abreast_sidecar.store.judged import Judged

REJUDGE = 0x616272657007  # who holds this lock changes pairs
REASON = "drift of state: asked again, both agree, and old says what new said"

Key = tuple[str, str, str]


async def wanted(database: Database, judged: Judged) -> bool:
    """Whether the pair shows something that may be a finding. Raise LedgerError."""
    row = await database.one("recheck_needed", _named(judged))
    return bool(row and row["needed"])


async def write(database: Database, judged: Judged, keys: Sequence[Key]) -> bool:
    """Whether it was written: not while rules are judged again, and not twice. Raise LedgerError."""
    async with database.connection() as connection, connection.transaction():
        cursor = await connection.execute(statement("lock_try"), {"lock": REJUDGE})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return False
        cursor = await connection.execute(statement("recheck_lock"), _named(judged))
        names = {(part, clean(path, PATH_LIMIT), kind) for part, path, kind in keys}
        found = [row for row in await cursor.fetchall() if (row["part"], row["path"], row["kind"]) in names]
        if found:
            await _take_off(connection, judged, found)
        return bool(found)


async def _take_off(connection: Connection, judged: Judged, found: Sequence[Row]) -> None:
    """Locks in the order of the ledger's writers: pairs and their sums, findings by id, endpoints by id."""
    ids = sorted(row["id"] for row in found)
    await connection.execute(statement("recheck_set"), {**_named(judged), "ids": ids, "reason": REASON})
    await connection.execute(statement("findings_lock"), {"ids": ids})
    given = json_text([_counters(judged, row) for row in found]).decode()
    await connection.execute(statement("findings_count"), {"rows": given})
    await connection.execute(statement("finding_drift_add"), {"ids": ids})
    endpoints = [found[0]["endpoint_id"]]
    await connection.execute(statement("endpoints_lock"), {"ids": endpoints})
    await connection.execute(statement("noise_reset"), {"ids": endpoints})


def _counters(judged: Judged, row: Row) -> dict[str, Any]:
    """What the pair had added, taken away."""
    shown = [one for one in judged.judgement.differences if _is(one, row)]
    leaning = lean(shown[0])
    return {
        "id": row["id"],
        "old_release": row["old_release"],
        "new_release": row["new_release"],
        "count": -1,
        "baseline_count": 0,
        "shape_explained": -int(explained(shown, judged.at / 1000)),
        "new_greater": -int(leaning > 0),
        "new_smaller": -int(leaning < 0),
        "impact": row["impact"],
        "first_ms": judged.at,
        "last_ms": judged.at,
    }


def _is(one: Difference, row: Row) -> bool:
    return (one.part, clean(one.path, PATH_LIMIT), one.kind) == (row["part"], row["path"], row["kind"])


def _named(judged: Judged) -> dict[str, Any]:
    return {"pair": judged.pair, "day": _day(judged.at)}


def _day(at: int) -> date:
    return datetime.fromtimestamp(at / 1000, UTC).date()
