"""What all steps read and write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from abreast_sidecar.rejudge.counters import CounterKey, CounterMoves
from abreast_sidecar.rejudge.places import FindingRef
from abreast_sidecar.store.clean import to_json
from abreast_sidecar.store.database import Connection, Row, load_statement


async def fetch_rows(
    connection: Connection, name: str, parameters: Mapping[str, Any] | None = None
) -> list[Row]:
    return await (await connection.execute(load_statement(name), parameters or {})).fetchall()


async def fetch_row(connection: Connection, name: str, parameters: Mapping[str, Any] | None = None) -> Row:
    (row,) = await fetch_rows(connection, name, parameters)
    return row


async def load_findings(connection: Connection, ids: Iterable[int] | None = None) -> dict[int, FindingRef]:
    rows = await fetch_rows(connection, "reapply_findings", {"ids": None if ids is None else list(ids)})
    return {row["id"]: FindingRef(**row) for row in rows}


async def write_counters(
    connection: Connection,
    counters: CounterMoves,
    findings: Mapping[int, FindingRef],
    unknown_counts: Mapping[CounterKey, int],
) -> set[int]:
    """The findings are locked. Return the endpoints of those that changed."""
    if rows := counters.build_finding_rows(findings):
        await connection.execute(load_statement("findings_count"), {"rows": to_json(rows).decode()})
    if rows := counters.build_rule_rows(unknown_counts):
        await connection.execute(load_statement("rule_findings_count"), {"rows": to_json(rows).decode()})
    return {
        findings[counter_key[1]].endpoint_id for counter_key in counters.deltas if counter_key[1] in findings
    }


async def mark_endpoints_due(connection: Connection, endpoints: Iterable[int]) -> None:
    """Their findings are told from noise anew."""
    ids = sorted(endpoints)
    await connection.execute(load_statement("endpoints_lock"), {"ids": ids})
    await connection.execute(load_statement("noise_reset"), {"ids": ids})
