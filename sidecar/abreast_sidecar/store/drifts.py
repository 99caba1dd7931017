"""What asking again told: a finding that was drift is taken off its pair, and counts apart."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

from abreast_sidecar.compare import Difference
from abreast_sidecar.compare.evidence import get_direction, is_explained_by_shape
from abreast_sidecar.store.catalogue import MAX_PATH_CHARS
from abreast_sidecar.store.clean import sanitise_text, to_json
from abreast_sidecar.store.database import Connection, Database, Row, load_statement
from abreast_sidecar.store.judged import PairRecord

REAPPLY_LOCK_KEY = 0x616272657007  # who holds this lock changes pairs
DRIFT_REASON = "drift of state: asked again, both agree, and old says what new said"

DriftedFindingKey = tuple[str, str, str]


async def needs_recheck(database: Database, record: PairRecord) -> bool:
    """Whether the pair shows something that may be a finding. Raise LedgerError."""
    row = await database.fetch_one("recheck_needed", _make_pair_key(record))
    return bool(row and row["needed"])


async def record_drift(database: Database, record: PairRecord, keys: Sequence[DriftedFindingKey]) -> bool:
    """Whether it was written: not while rules are judged again, and not twice. Raise LedgerError."""
    async with database.connection() as connection, connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": REAPPLY_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return False
        cursor = await connection.execute(load_statement("recheck_lock"), _make_pair_key(record))
        finding_keys = {(part, sanitise_text(path, MAX_PATH_CHARS), kind) for part, path, kind in keys}
        finding_rows = [
            row for row in await cursor.fetchall() if (row["part"], row["path"], row["kind"]) in finding_keys
        ]
        if finding_rows:
            await _remove_from_pair(connection, record, finding_rows)
        return bool(finding_rows)


async def _remove_from_pair(connection: Connection, record: PairRecord, finding_rows: Sequence[Row]) -> None:
    """Locks in the order of the ledger's writers: pairs and their sums, findings by id, endpoints by id."""
    ids = sorted(row["id"] for row in finding_rows)
    await connection.execute(
        load_statement("recheck_set"), {**_make_pair_key(record), "ids": ids, "reason": DRIFT_REASON}
    )
    await connection.execute(load_statement("findings_lock"), {"ids": ids})
    deltas = to_json([_build_removal_deltas(record, row) for row in finding_rows]).decode()
    await connection.execute(load_statement("findings_count"), {"rows": deltas})
    await connection.execute(load_statement("finding_drift_add"), {"ids": ids})
    endpoints = [finding_rows[0]["endpoint_id"]]
    await connection.execute(load_statement("endpoints_lock"), {"ids": endpoints})
    await connection.execute(load_statement("noise_reset"), {"ids": endpoints})


def _build_removal_deltas(record: PairRecord, row: Row) -> dict[str, Any]:
    """What the pair had added, taken away."""
    differences = [
        difference for difference in record.result.differences if _is_same_finding(difference, row)
    ]
    sign = get_direction(differences[0])
    return {
        "id": row["id"],
        "old_release": row["old_release"],
        "new_release": row["new_release"],
        "count": -1,
        "baseline_count": 0,
        "shape_explained": -int(is_explained_by_shape(differences, record.time_ms / 1000)),
        "new_greater": -int(sign > 0),
        "new_smaller": -int(sign < 0),
        "impact": row["impact"],
        "first_ms": record.time_ms,
        "last_ms": record.time_ms,
    }


def _is_same_finding(difference: Difference, row: Row) -> bool:
    return (difference.part, sanitise_text(difference.path, MAX_PATH_CHARS), difference.kind) == (
        row["part"],
        row["path"],
        row["kind"],
    )


def _make_pair_key(record: PairRecord) -> dict[str, Any]:
    return {"pair": record.pair_id, "day": _to_utc_date(record.time_ms)}


def _to_utc_date(time_ms: int) -> date:
    return datetime.fromtimestamp(time_ms / 1000, UTC).date()
