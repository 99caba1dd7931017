"""Traffic settings in Postgres. Each change writes its event and notifies all sidecars in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from abreast_sidecar.errors import NotFoundError
from abreast_sidecar.store.database import Connection, Database, Row, load_statement
from abreast_sidecar.traffic.model import AuditNote, Shares, Traffic, TrafficChange

TRAFFIC_CHANNEL = "abreast_traffic"  # NOTIFY; the payload is the service


@dataclass(frozen=True, slots=True)
class VersionedTraffic:
    """Settings, and their age in seconds by Postgres's clock."""

    traffic: Traffic
    age_s: float


@dataclass(frozen=True, slots=True)
class TrafficEvent:
    id: int
    at: datetime
    actor: str
    action: str  # create, update, rollback, promote, ramp_* or guard_*
    reason: str
    before: Traffic | None
    after: Traffic
    detail: Mapping[str, Any]  # guard_before, guard_after, ramp_before, ramp_after, if the event has them


class TrafficRepository:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def read(self, service: str | None = None) -> list[VersionedTraffic]:
        """Return the settings of one service, or of all (None) ordered by name."""
        rows = await self.database.fetch_all("traffic_read", {"service": service})
        return [_to_versioned_traffic(row) for row in rows]

    async def is_known_service(self, service: str) -> bool:
        """Return True if an Envoy or a capture has ever named the service."""
        row = await self.database.fetch_one("service_exists", {"service": service})
        return row is not None and bool(row["named"])

    async def list_services(self) -> list[str]:
        return [row["service"] for row in await self.database.fetch_all("services")]

    async def ensure(self, service: str, shares: Shares, note: AuditNote) -> VersionedTraffic:
        """Return the settings of a service. Create missing ones with `shares`."""
        async with self.database.connection() as connection, connection.transaction():
            values = {"service": service, **asdict(shares)}
            cursor = await connection.execute(load_statement("traffic_create"), values)
            is_new = await cursor.fetchone() is not None
            snapshot = await get_for_update(connection, service)
            if is_new:
                at = snapshot.traffic.updated_at
                await insert_event(connection, "create", note, None, snapshot.traffic, at=at)
        return snapshot

    async def change(self, service: str, change: TrafficChange, note: AuditNote) -> VersionedTraffic:
        """Apply a change. Raise NotFoundError for a service without settings. No event is written if nothing changes."""
        async with self.database.connection() as connection, connection.transaction():
            before = await get_for_update(connection, service)
            shares = change.apply(before.traffic.shares)
            if shares == before.traffic.shares:
                return before
            after = await update_shares(connection, service, shares)
            at = after.traffic.updated_at
            await insert_event(connection, change.action, note, before.traffic, after.traffic, at=at)
        return after

    async def record_rollback(
        self, service: str, note: AuditNote, call_id: str, *, always_record_event: bool
    ) -> VersionedTraffic:
        """Apply a rollback once per `call_id`, however many sidecars record it.

        `always_record_event`: write an event even if nothing changes.
        """
        async with self.database.connection() as connection, connection.transaction():
            before = await get_for_update(connection, service)
            cursor = await connection.execute(
                load_statement("rollback_recorded"), {"service": service, "call": call_id}
            )
            shares = TrafficChange.rollback().apply(before.traffic.shares)
            if await cursor.fetchone() or (shares == before.traffic.shares and not always_record_event):
                return before
            after = await update_shares(connection, service, shares)
            at = after.traffic.updated_at
            await insert_event(connection, "rollback", note, before.traffic, after.traffic, at=at, call_id=call_id)
        return after

    async def list_events(self, service: str, *, before_id: int | None, limit: int) -> list[TrafficEvent]:
        """Return events, the newest first."""
        rows = await self.database.fetch_all(
            "traffic_events", {"service": service, "before_id": before_id, "limit": limit}
        )
        return [_to_event(service, row) for row in rows]


async def get_for_update(connection: Connection, service: str) -> VersionedTraffic:
    cursor = await connection.execute(load_statement("traffic_lock"), {"service": service})
    row = await cursor.fetchone()
    if row is None:
        raise NotFoundError(f"no Envoy and no capture has named the service {service!r}")
    return _to_versioned_traffic(row)


async def update_shares(connection: Connection, service: str, shares: Shares) -> VersionedTraffic:
    cursor = await connection.execute(load_statement("traffic_update"), {"service": service, **asdict(shares)})
    (row,) = await cursor.fetchall()
    return _to_versioned_traffic(row)


async def insert_event(
    connection: Connection,
    action: str,
    note: AuditNote,
    before: Traffic | None,
    after: Traffic,
    *,
    at: datetime | None = None,
    call_id: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write an event. `at`: its time by Postgres's clock, None for now."""
    values = {
        "service": after.service,
        "at": at,
        "actor": note.actor,
        "action": action,
        "reason": note.reason,
        "before": None if before is None else Jsonb(_to_document(before)),
        "after": Jsonb(_to_document(after) | ({"call": call_id} if call_id else {})),
        "detail": Jsonb(dict(detail or {})),
    }
    await connection.execute(load_statement("traffic_event_add"), values)


def _to_document(traffic: Traffic) -> dict[str, Any]:
    return {"version": traffic.version, "updated_at": traffic.updated_at.isoformat(), **asdict(traffic.shares)}


def _to_versioned_traffic(row: Row) -> VersionedTraffic:
    return VersionedTraffic(_to_traffic(row["service"], row, row["updated_at"]), row["age"])


def _to_traffic(service: str, row: Row, updated_at: datetime) -> Traffic:
    shares = Shares(
        new_share=row["new_share"],
        sample_safe=row["sample_safe"],
        sample_unsafe=row["sample_unsafe"],
        baseline_share=row["baseline_share"],
        rolled_back=row["rolled_back"],
    )
    return Traffic(service=service, version=row["version"], updated_at=updated_at, shares=shares)


def _to_event(service: str, row: Row) -> TrafficEvent:
    def state(document: Row | None) -> Traffic | None:
        if document is None:
            return None
        return _to_traffic(service, document, datetime.fromisoformat(document["updated_at"]))

    after = state(row["after"])
    assert after is not None
    columns = {name: row[name] for name in ("id", "at", "actor", "action", "reason", "detail")}
    return TrafficEvent(before=state(row["before"]), after=after, **columns)
