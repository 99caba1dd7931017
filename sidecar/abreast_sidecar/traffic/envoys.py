"""The Envoys of all sidecars: each sidecar keeps its own in Postgres, where the others read them when they are asked.

Nothing here is on the way of an Envoy's stream. What a sidecar keeps is gone when it stops, and some seconds after its
last sign of life when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from abreast_sidecar.aio import Notifier, Outage, error_within
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.store.database import Database, Row, sanitise_text, to_json
from abreast_sidecar.traffic.model import Traffic, VersionStamp

_connection_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class EnvoyState:
    node: str
    acknowledged_version: int  # 0 for none yet
    acknowledged_after: float | None  # seconds from the change, or from the connection where that came later
    error: str = ""  # why it refused the last settings that it was sent
    peer: str = ""
    sidecar: str = ""


@dataclass(frozen=True, slots=True)
class EnvoyStatus:
    """Where one Envoy stands, whichever sidecar it is connected to."""

    service: str
    node: str
    peer: str
    number: int  # in the order of connecting
    acknowledged_stamp: VersionStamp | None
    answered_stamp: VersionStamp | None  # what it acknowledged or refused last
    after: float | None  # seconds, of what it acknowledged
    error: str
    sidecar: str = ""

    def has_answered(self, traffic: Traffic) -> bool:
        """Whether this Envoy has the state or a later one, or has refused it."""
        return self.answered_stamp is not None and self.answered_stamp >= traffic.version_stamp

    def to_state(self, traffic: Traffic) -> EnvoyState:
        return EnvoyState(
            node=self.node,
            acknowledged_version=self.acknowledged_stamp[1] if self.acknowledged_stamp else 0,
            acknowledged_after=self.after if self.acknowledged_stamp == traffic.version_stamp else None,
            error=self.error,
            peer=self.peer,
            sidecar=self.sidecar,
        )


@dataclass
class EnvoyConnection:
    """One discovery stream of one Envoy."""

    node: str
    service: str
    peer: str = ""
    number: int = field(default_factory=lambda: next(_connection_numbers))
    connected_monotonic: float = field(default_factory=time.monotonic)
    sent_traffic: Traffic | None = None
    ack_timer_start: float = 0.0  # monotonic: when that state was set
    send_count: int = 0
    acknowledged_traffic: Traffic | None = None
    acknowledged_after: float | None = None
    error: str = ""

    @property
    def nonce(self) -> str:
        return f"{self.number}.{self.send_count}"

    def record_sent(self, traffic: Traffic, changed_monotonic: float) -> None:
        self.sent_traffic = traffic
        self.send_count += 1
        self.ack_timer_start = max(changed_monotonic, self.connected_monotonic)

    def accept_answer(self, nonce: str, error: str) -> bool:
        """Whether the answer is about the state that was sent last."""
        if self.sent_traffic is None or nonce != self.nonce:
            return False
        self.error = error
        if not error:
            self.acknowledged_traffic = self.sent_traffic
            self.acknowledged_after = time.monotonic() - self.ack_timer_start
        return True

    @property
    def last_answered_traffic(self) -> Traffic | None:
        return self.sent_traffic if self.error else self.acknowledged_traffic

    def has_answered(self, traffic: Traffic) -> bool:
        """As `Standing.settled`, for many Envoys at each of their answers."""
        answered_traffic = self.last_answered_traffic
        return answered_traffic is not None and not traffic.is_newer_than(answered_traffic)

    def to_status(self, sidecar: str) -> EnvoyStatus:
        answered_traffic = self.last_answered_traffic
        return EnvoyStatus(
            service=self.service,
            node=self.node,
            peer=self.peer,
            number=self.number,
            acknowledged_stamp=self.acknowledged_traffic.version_stamp if self.acknowledged_traffic else None,
            answered_stamp=answered_traffic.version_stamp if answered_traffic else None,
            after=self.acknowledged_after,
            error=self.error,
            sidecar=sidecar,
        )


class EnvoyConnections:
    """Every stream counts, also where Envoys share a node id: each holds values of its own. One whose Envoy went away
    without a word ends when the server's keepalive finds out.
    """

    def __init__(self) -> None:
        self.sidecar_name = ""  # what this one is called
        self.notifier = Notifier()  # an Envoy came, went or answered
        self._connections: dict[int, EnvoyConnection] = {}

    def add(self, envoy: EnvoyConnection) -> None:
        self._connections[envoy.number] = envoy
        self.notifier.notify_all()

    def remove(self, envoy: EnvoyConnection) -> None:
        self._connections.pop(envoy.number, None)
        self.notifier.notify_all()

    def list_all(self) -> list[EnvoyStatus]:
        return [envoy.to_status(self.sidecar_name) for envoy in self._connections.values()]

    def list_for_service(self, service: str) -> list[EnvoyStatus]:
        return [envoy for envoy in self.list_all() if envoy.service == service]

    def list_states(self, traffic: Traffic) -> list[EnvoyState]:
        return [envoy.to_state(traffic) for envoy in self.list_for_service(traffic.service)]

    def count_by_service(self) -> dict[str, int]:
        return Counter(envoy.service for envoy in self._connections.values())

    async def wait_acknowledged(self, traffic: Traffic, timeout_s: float) -> None:
        """Until every Envoy of the service here has answered, or the time (seconds) is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._have_all_answered(traffic):
                    await self.notifier.wait()

    def _have_all_answered(self, traffic: Traffic) -> bool:
        return all(
            envoy.has_answered(traffic) for envoy in self._connections.values() if envoy.service == traffic.service
        )


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
        self._write_database = Database(database.conninfo)  # long queries of others must not hold up a sign of life
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
    return EnvoyStatus(acknowledged_stamp=moment("acknowledged"), answered_stamp=moment("answered"), **columns)
