"""The Envoys of all sidecars: each sidecar keeps its own in Postgres, where the others read them when they are asked.

Nothing here is on the way of an Envoy's stream. What a sidecar keeps is gone when it stops, and some seconds after its
last sign of life when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abreast_sidecar.control.bell import Notifier
from abreast_sidecar.control.envoys import EnvoyConnections, EnvoyState, EnvoyStatus
from abreast_sidecar.control.patience import error_within
from abreast_sidecar.control.traffic import Traffic, VersionStamp
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.outage import Outage
from abreast_sidecar.store.clean import sanitise_text, to_json
from abreast_sidecar.store.database import Database, Row

ENVOYS_CHANNEL = "abreast_envoys"  # NOTIFY
REPLICA_HEARTBEAT_S = 1.0  # seconds between two signs of life
REPLICA_EXPIRY_S = 5.0  # seconds after the last one
MAX_ENVOY_TEXT_CHARS = 500  # characters of a name or an error


@dataclass(frozen=True, slots=True)
class EnvoyFleet:
    """Who is connected to any sidecar. `unknown`: why those of other sidecars are not among them; empty where they are."""

    envoys: Sequence[EnvoyStatus]
    unknown: str = ""

    def have_all_answered(self, traffic: Traffic) -> bool:
        return all(envoy.has_answered(traffic) for envoy in self.envoys)

    @property
    def several(self) -> bool:
        """Whether more than one sidecar has some."""
        return len({envoy.sidecar for envoy in self.envoys}) > 1

    def states(self, traffic: Traffic) -> list[EnvoyState]:
        ordered = sorted(self.envoys, key=lambda envoy: (envoy.node, envoy.sidecar, envoy.number))
        return [envoy.to_state(traffic) for envoy in ordered]


class EnvoyRegistry:
    def __init__(self, database: Database, connections: EnvoyConnections) -> None:
        self._read_database = database
        self._write_database = Database(
            database.conninfo
        )  # long queries of others must not hold up a sign of life
        self._connections = connections
        self._id = str(uuid.uuid4())
        self._notifier = Notifier()
        self._notification_count = 0

    async def handle_notification(self) -> None:
        """Others have told something."""
        self._notification_count += 1
        self._notifier.notify_all()

    def list_local(self, service: str, unknown: str) -> EnvoyFleet:
        return EnvoyFleet(self._connections.list_for_service(service), unknown)

    async def list_all(self, service: str) -> EnvoyFleet:
        remote_task = asyncio.create_task(self._list_remote(service))
        if problem := await error_within(remote_task):
            return self.list_local(service, problem)
        return EnvoyFleet([*self._connections.list_for_service(service), *remote_task.result()])

    async def wait_acknowledged(self, traffic: Traffic, timeout_s: float) -> EnvoyFleet:
        """Once every Envoy of every sidecar has answered, or `wait` seconds are over, or others can't be asked."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        await self._connections.wait_acknowledged(traffic, timeout_s)
        while True:
            notification_count = self._notification_count
            fleet = await self.list_all(traffic.service)
            if fleet.unknown or fleet.have_all_answered(traffic) or clock() >= deadline:
                return fleet
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    while self._notification_count == notification_count:
                        await self._notifier.wait()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep what is connected here. Return once `stop` is set, and the envoys' bell rung."""
        outage = Outage("postgres", by="roster")
        await self._write_database.open()
        try:
            while not stop.is_set():
                try:
                    await self._publish(stop)
                    outage.record_success()
                except LedgerError as error:
                    outage.record_failure(error)
                    await outage.back_off(stop)
        finally:
            await self._unregister()
            await self._write_database.close()

    async def _publish(self, stop: asyncio.Event) -> None:
        """Write what is new, and once a BEAT that this sidecar is alive."""
        last_statuses: list[EnvoyStatus] | None = None
        while not stop.is_set():
            statuses = self._connections.list_all()
            values = {"id": self._id, "address": self._connections.sidecar_name, "expires": REPLICA_EXPIRY_S}
            changes = {
                "envoys": to_json(list(map(to_envoy_document, statuses))).decode(),
                "changed": statuses != last_statuses,
                "starts": last_statuses is None,
            }
            await self._write_database.execute("sidecar_set", values | changes)
            last_statuses = statuses
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLICA_HEARTBEAT_S):
                    while self._connections.list_all() == last_statuses and not stop.is_set():
                        await self._connections.notifier.wait()

    async def _unregister(self) -> None:
        delete_task = asyncio.create_task(self._write_database.execute("sidecar_delete", {"id": self._id}))
        await error_within(delete_task)

    async def _list_remote(self, service: str) -> list[EnvoyStatus]:
        params = {"id": self._id, "service": service, "expires": REPLICA_EXPIRY_S}
        return [to_envoy_status(row) for row in await self._read_database.fetch_all("sidecar_envoys", params)]


def to_envoy_document(envoy: EnvoyStatus) -> dict[str, Any]:
    acknowledged_stamp, answered_stamp = envoy.acknowledged_stamp, envoy.answered_stamp
    return {
        "service": envoy.service,
        "node": sanitise_text(envoy.node, MAX_ENVOY_TEXT_CHARS),
        "peer": envoy.peer,
        "number": envoy.number,
        "acknowledged_at": acknowledged_stamp and acknowledged_stamp[0].isoformat(),
        "acknowledged_version": acknowledged_stamp and acknowledged_stamp[1],
        "answered_at": answered_stamp and answered_stamp[0].isoformat(),
        "answered_version": answered_stamp and answered_stamp[1],
        "after": envoy.after,
        "error": sanitise_text(envoy.error, MAX_ENVOY_TEXT_CHARS),
    }


def to_envoy_status(row: Row) -> EnvoyStatus:
    def moment(name: str) -> VersionStamp | None:
        at = row[f"{name}_at"]
        return None if at is None else (at, row[f"{name}_version"])

    columns = {name: row[name] for name in ("service", "node", "peer", "number", "after", "error", "sidecar")}
    return EnvoyStatus(
        acknowledged_stamp=moment("acknowledged"), answered_stamp=moment("answered"), **columns
    )
