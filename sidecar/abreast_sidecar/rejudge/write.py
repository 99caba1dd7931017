"""What all steps read and write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from abreast_sidecar.rejudge.counters import Counters, Slot
from abreast_sidecar.rejudge.places import Known
from abreast_sidecar.store.clean import json_text
from abreast_sidecar.store.database import Connection, Row, statement


async def rows_of(
    connection: Connection, name: str, parameters: Mapping[str, Any] | None = None
) -> list[Row]:
    return await (await connection.execute(statement(name), parameters or {})).fetchall()


async def one_of(connection: Connection, name: str, parameters: Mapping[str, Any] | None = None) -> Row:
    (row,) = await rows_of(connection, name, parameters)
    return row


async def known_findings(connection: Connection, ids: Iterable[int] | None = None) -> dict[int, Known]:
    rows = await rows_of(connection, "reapply_findings", {"ids": None if ids is None else list(ids)})
    return {row["id"]: Known(**row) for row in rows}


async def write_counters(
    connection: Connection, counters: Counters, found: Mapping[int, Known], unknown: Mapping[Slot, int]
) -> set[int]:
    """The findings are locked. Return the endpoints of those that changed."""
    if given := counters.of_findings(found):
        await connection.execute(statement("findings_count"), {"rows": json_text(given).decode()})
    if given := counters.of_rules(unknown):
        await connection.execute(statement("rule_findings_count"), {"rows": json_text(given).decode()})
    return {found[slot[1]].endpoint_id for slot in counters.changes if slot[1] in found}


async def mark_due(connection: Connection, endpoints: Iterable[int]) -> None:
    """Their findings are told from noise anew."""
    ids = sorted(endpoints)
    await connection.execute(statement("endpoints_lock"), {"ids": ids})
    await connection.execute(statement("noise_reset"), {"ids": ids})
