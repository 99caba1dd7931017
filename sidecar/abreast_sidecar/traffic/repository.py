"""Traffic settings in Postgres. Each change writes its event and notifies all sidecars in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from abreast_sidecar.errors import NotFoundError, StaleVersionError
from abreast_sidecar.store.database import Connection, Database, Row, fetch_row, fetch_rows, load_statement, to_json
from abreast_sidecar.traffic.model import AuditNote, Shares, Traffic, TrafficChange

TRAFFIC_CHANNEL = "abreast_traffic"  # NOTIFY; the payload is the service


@dataclass(frozen=True, slots=True)
class TrafficSnapshot:
    """Settings, and their age in seconds by Postgres's clock."""

    traffic: Traffic
    age_s: float
    includes_known: bool  # False if the ledger has lost the settings that this sidecar knows


@dataclass(frozen=True, slots=True)
class TrafficEvent:
    id: int
    at: datetime
    actor: str
    action: str  # create, update, rollback, promote, reconcile, ramp_* or guard_*
    reason: str
    before: Traffic | None
    after: Traffic
    detail: Mapping[str, Any]  # guard_before, guard_after, ramp_before, ramp_after, if the event has them


class TrafficRepository:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def read(self, service: str | None, known_revisions: Mapping[str, str]) -> list[TrafficSnapshot]:
        """Return the settings of one service, or of all (None) ordered by name. `known_revisions`: by service."""
        rows = await self.database.fetch_all("traffic_read", {"service": service, "known": Jsonb(known_revisions)})
        return [TrafficSnapshot(_to_traffic(row["service"], row), row["age"], row["includes_known"]) for row in rows]

    async def includes(self, traffic: Traffic) -> bool:
        """Return True if the ledger's history contains the settings."""
        async with self.database.connection() as connection:
            return await _includes(connection, traffic.service, traffic.revision)

    async def read_control_key(self) -> bytes:
        row = await self.database.fetch_one("control_key")
        assert row is not None
        return bytes(row["key"])

    async def list_recorded_rollbacks(self) -> list[str]:
        """Return the ids of all calls."""
        return [row["call"] for row in await self.database.fetch_all("rollbacks_recorded")]

    async def is_known_service(self, service: str) -> bool:
        """Return True if an Envoy or a capture has ever named the service."""
        row = await self.database.fetch_one("service_exists", {"service": service})
        return row is not None and bool(row["named"])

    async def list_services(self) -> list[str]:
        return [row["service"] for row in await self.database.fetch_all("services")]

    async def ensure(self, service: str, shares: Shares, note: AuditNote) -> None:
        """Create the settings of a service if it has none."""
        async with self.database.connection() as connection, connection.transaction():
            cursor = await connection.execute(load_statement("traffic_create"), {"service": service, **asdict(shares)})
            if await cursor.fetchone() is not None:
                traffic = await get_for_update(connection, service)
                await insert_event(connection, "create", note, None, traffic, at=traffic.updated_at)

    async def change(self, service: str, change: TrafficChange, note: AuditNote) -> Traffic:
        """Apply a change. Raise NotFoundError for a service without settings, and StaleVersionError.

        No event is written if nothing changes.
        """
        async with self.database.connection() as connection, connection.transaction():
            before = await get_for_update(connection, service)
            if change.expected_version not in {None, before.version}:
                raise StaleVersionError(
                    f"the traffic settings of {service} have version {before.version}, not {change.expected_version}: "
                    "somebody changed them; read them again"
                )
            shares = change.apply(before.shares)
            if shares == before.shares:
                return before
            after = await update_shares(connection, service, shares)
            await insert_event(connection, change.action, note, before, after, at=after.updated_at)
        return after

    async def record_rollback(self, service: str, note: AuditNote, call_id: str) -> None:
        """Apply a rollback once per `call_id`, however many sidecars record it. It is a new version in any case."""
        async with self.database.connection() as connection, connection.transaction():
            before = await get_for_update(connection, service)
            if await _includes(connection, service, call_id):
                return
            shares = TrafficChange.rollback().apply(before.shares)
            after = await update_shares(connection, service, shares, revision=call_id)
            await insert_event(connection, "rollback", note, before, after, at=after.updated_at)

    async def merge(self, lost: Traffic, conflict: str) -> None:
        """Add settings that the ledger has lost to its history, unless another sidecar has."""
        async with self.database.connection() as connection, connection.transaction():
            before = await get_for_update(connection, lost.service)
            if await _includes(connection, lost.service, lost.revision):
                return
            after = await update_shares(connection, lost.service, before.shares.merge(lost.shares, conflict))
            note = AuditNote("sidecar", conflict)
            await insert_event(connection, "reconcile", note, before, after, at=after.updated_at, merged=lost.revision)

    async def list_events(self, service: str, *, before_id: int | None, limit: int) -> list[TrafficEvent]:
        """Return events, the newest first."""
        rows = await self.database.fetch_all(
            "traffic_events", {"service": service, "before_id": before_id, "limit": limit}
        )
        return [_to_event(service, row) for row in rows]


async def get_for_update(connection: Connection, service: str) -> Traffic:
    cursor = await connection.execute(load_statement("traffic_lock"), {"service": service})
    row = await cursor.fetchone()
    if row is None:
        raise NotFoundError(f"no Envoy and no capture has named the service {service!r}")
    return _to_traffic(service, row)


async def update_shares(
    connection: Connection, service: str, shares: Shares, *, revision: str | None = None
) -> Traffic:
    """Write a new version. The caller writes its event in the same transaction."""
    values = {"service": service, "revision": revision, **asdict(shares), "rule_shares": to_json(shares.rule_shares)}
    return _to_traffic(service, await fetch_row(connection, "traffic_update", values))


async def _includes(connection: Connection, service: str, revision: str) -> bool:
    """Check the history. The statement sees all changes from before the caller locked the settings."""
    rows = await fetch_rows(connection, "traffic_includes", {"service": service, "known": revision})
    return bool(rows and rows[0]["included"])


async def insert_event(
    connection: Connection,
    action: str,
    note: AuditNote,
    before: Traffic | None,
    after: Traffic,
    *,
    at: datetime | None = None,
    merged: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write an event. `at`: its time by Postgres's clock, None for now. `merged`: the revision of lost settings."""
    values = {
        "service": after.service,
        "at": at,
        "actor": note.actor,
        "action": action,
        "reason": note.reason,
        "before": None if before is None else Jsonb(_to_document(before)),
        "after": Jsonb(_to_document(after) | ({"merged": merged} if merged else {})),
        "detail": Jsonb(dict(detail or {})),
    }
    await connection.execute(load_statement("traffic_event_add"), values)


def _to_document(traffic: Traffic) -> dict[str, Any]:
    return {
        "version": traffic.version,
        "revision": traffic.revision,
        "updated_at": traffic.updated_at.isoformat(),
        **asdict(traffic.shares),
    }


def _to_traffic(service: str, row: Row) -> Traffic:
    """Convert a row, or the document of an event."""
    shares = Shares(**{field.name: row[field.name] for field in fields(Shares)})
    updated_at = row["updated_at"]
    if isinstance(updated_at, str):
        updated_at = datetime.fromisoformat(updated_at)
    return Traffic(service, row["version"], updated_at, shares, row["revision"])


def _to_event(service: str, row: Row) -> TrafficEvent:
    before = row["before"] and _to_traffic(service, row["before"])
    columns = {name: row[name] for name in ("id", "at", "actor", "action", "reason", "detail")}
    return TrafficEvent(before=before, after=_to_traffic(service, row["after"]), **columns)
