"""Traffic settings in Postgres: each change with who and why, in one transaction that tells every sidecar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from abreast_sidecar.control.traffic import Change, Note, Shares, Traffic
from abreast_sidecar.errors import NotFoundError
from abreast_sidecar.store.database import Connection, Database, Row, statement

CHANNEL = "abreast_traffic"  # NOTIFY; the payload is the service
CREATE = "create"


@dataclass(frozen=True, slots=True)
class Known:
    """A state, and how long ago (seconds) it was set, by Postgres's clock."""

    traffic: Traffic
    age: float


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    at: datetime
    actor: str
    action: str  # create, update, rollback, promote; ramp_… and guard_…
    reason: str
    before: Traffic | None
    after: Traffic
    detail: Mapping[
        str, Any
    ]  # of guard and ramp: {guard_before, guard_after, ramp_before, ramp_after}, where there are


class Journal:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def read(self, service: str | None = None) -> list[Known]:
        """All services, or the one; ordered by name."""
        return [_known(row) for row in await self.database.rows("traffic_read", {"service": service})]

    async def named(self, service: str) -> bool:
        """Whether an Envoy or a capture has ever named the service."""
        row = await self.database.one("service_exists", {"service": service})
        return row is not None and bool(row["named"])

    async def services(self) -> list[str]:
        return [row["service"] for row in await self.database.rows("services")]

    async def seed(self, service: str, shares: Shares, note: Note) -> Known:
        """The state of a service; what is given becomes its first."""
        async with self.database.connection() as connection, connection.transaction():
            values = {"service": service, **asdict(shares)}
            cursor = await connection.execute(statement("traffic_create"), values)
            created = await cursor.fetchone() is not None
            known = await locked(connection, service)
            if created:
                await _record(connection, CREATE, note, None, known.traffic)
        return known

    async def change(self, service: str, change: Change, note: Note) -> Known:
        """Raise NotFoundError for a service without settings. What changes nothing leaves no event."""
        async with self.database.connection() as connection, connection.transaction():
            before = await locked(connection, service)
            shares = change.apply(before.traffic.shares)
            if shares == before.traffic.shares:
                return before
            after = await changed(connection, service, shares)
            await _record(connection, change.action, note, before.traffic, after.traffic)
        return after

    async def record_rollback(self, service: str, note: Note, call: str, *, always: bool) -> Known:
        """Once for each `call`, by however many sidecars. What changes nothing leaves an event where it `always` does."""
        async with self.database.connection() as connection, connection.transaction():
            before = await locked(connection, service)
            cursor = await connection.execute(
                statement("rollback_recorded"), {"service": service, "call": call}
            )
            shares = Change.rollback().apply(before.traffic.shares)
            if await cursor.fetchone() or (shares == before.traffic.shares and not always):
                return before
            after = await changed(connection, service, shares)
            await _record(connection, "rollback", note, before.traffic, after.traffic, call=call)
        return after

    async def events(self, service: str, *, before_id: int | None, limit: int) -> list[Event]:
        """Newest first."""
        rows = await self.database.rows(
            "traffic_events", {"service": service, "before_id": before_id, "limit": limit}
        )
        return [_event(service, row) for row in rows]


async def locked(connection: Connection, service: str) -> Known:
    cursor = await connection.execute(statement("traffic_lock"), {"service": service})
    row = await cursor.fetchone()
    if row is None:
        raise NotFoundError(f"no Envoy and no capture has named the service {service!r}")
    return _known(row)


async def changed(connection: Connection, service: str, shares: Shares) -> Known:
    cursor = await connection.execute(statement("traffic_update"), {"service": service, **asdict(shares)})
    (row,) = await cursor.fetchall()
    return _known(row)


async def _record(
    connection: Connection,
    action: str,
    note: Note,
    before: Traffic | None,
    after: Traffic,
    *,
    call: str = "",
) -> None:
    values = {
        "service": after.service,
        "at": after.updated_at,
        "actor": note.actor,
        "action": action,
        "reason": note.reason,
        "before": None if before is None else Jsonb(document(before)),
        "after": Jsonb(document(after) | ({"call": call} if call else {})),
    }
    await connection.execute(statement("traffic_event_add"), values)


def document(traffic: Traffic) -> dict[str, Any]:
    return {
        "version": traffic.version,
        "updated_at": traffic.updated_at.isoformat(),
        **asdict(traffic.shares),
    }


def _known(row: Row) -> Known:
    return Known(_traffic(row["service"], row, row["updated_at"]), row["age"])


def _traffic(service: str, row: Row, updated_at: datetime) -> Traffic:
    shares = Shares(
        new_share=row["new_share"],
        sample_safe=row["sample_safe"],
        sample_unsafe=row["sample_unsafe"],
        baseline_share=row["baseline_share"],
        rolled_back=row["rolled_back"],
    )
    return Traffic(service=service, version=row["version"], updated_at=updated_at, shares=shares)


def _event(service: str, row: Row) -> Event:
    def state(document: Row | None) -> Traffic | None:
        if document is None:
            return None
        return _traffic(service, document, datetime.fromisoformat(document["updated_at"]))

    after = state(row["after"])
    assert after is not None
    told = {name: row[name] for name in ("id", "at", "actor", "action", "reason", "detail")}
    return Event(before=state(row["before"]), after=after, **told)
