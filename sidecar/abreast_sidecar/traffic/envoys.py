"""The Envoys of all sidecars. Each sidecar publishes its connected Envoys to Postgres, where its peers read them.

No discovery stream waits for this. The rows of a sidecar disappear when it stops, or REPLICA_EXPIRY_S after its last
heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import structlog

from abreast_sidecar.aio import Notifier, Outage, error_within
from abreast_sidecar.envoy.sampling import SampleRule, parse_rules
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.store.database import Database, sanitise_text, to_json
from abreast_sidecar.traffic.model import Traffic

ENVOYS_CHANNEL = "abreast_envoys"  # NOTIFY
REPLICA_HEARTBEAT_S = 2.0
MAX_HEARTBEAT_DELAY_S = 3.0
REPLICA_EXPIRY_S = 5.0
MAX_ENVOY_TEXT_CHARS = 500  # per node id or error

log = structlog.get_logger(__name__)

_connection_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class EnvoyStatus:
    """An Envoy and its acknowledgement."""

    service: str
    node: str
    peer: str = ""
    number: int = field(default_factory=lambda: next(_connection_numbers))  # in the order of connecting
    acknowledged: str = ""  # stamp of the settings that the Envoy accepted last
    answered: str = ""  # stamp of the settings that the Envoy accepted or refused last
    after: float | None = None  # seconds from the change, or the connection if later, to `acknowledged`
    error: str = ""  # the reason of a refusal; empty if the last answer was an acknowledgement
    sidecar: str = ""
    scope: str = ""  # the start of the service's names in an Envoy with several services
    rules: tuple[SampleRule, ...] = ()  # in its file

    @property
    def acknowledged_version(self) -> int:
        """Version of the acknowledged settings, 0 for none."""
        return int(self.acknowledged.partition("/")[0] or 0)

    def acknowledged_after(self, traffic: Traffic) -> float | None:
        """Return the seconds until these settings were acknowledged, None if they were not."""
        return self.after if self.acknowledged == traffic.stamp else None

    def has_answered(self, traffic: Traffic) -> bool:
        """Return True if the Envoy accepted or refused exactly these settings."""
        return self.answered == traffic.stamp


@dataclass
class EnvoyConnection:
    """One discovery stream of one Envoy."""

    status: EnvoyStatus
    connected_monotonic: float = field(default_factory=time.monotonic)
    sent_traffic: Traffic | None = None
    ack_timer_start: float = 0.0  # monotonic
    send_count: int = 0

    @property
    def nonce(self) -> str:
        return f"{self.status.number}.{self.send_count}"

    def record_sent(self, traffic: Traffic, changed_monotonic: float) -> None:
        self.sent_traffic = traffic
        self.send_count += 1
        if self.status.error:  # after a refusal nobody waits for this Envoy until it acknowledges again
            self.status = replace(self.status, answered=traffic.stamp)
        self.ack_timer_start = max(changed_monotonic, self.connected_monotonic)

    def accept_answer(self, nonce: str, error: str) -> bool:
        """Return True if the answer is about the settings that were sent last."""
        if self.sent_traffic is None or nonce != self.nonce:
            return False
        stamp = self.sent_traffic.stamp
        self.status = replace(self.status, answered=stamp, error=error)
        if not error:
            self.status = replace(self.status, acknowledged=stamp, after=time.monotonic() - self.ack_timer_start)
        return True


class EnvoyConnections:
    """The Envoys of this sidecar, one entry per stream: Envoys that share a node id hold separate values.

    The gRPC server's keepalive ends the stream of an Envoy that disappeared.
    """

    def __init__(self) -> None:
        self.sidecar_name = ""
        self.notifier = Notifier()  # an Envoy connected, left or answered
        self._connections: dict[int, EnvoyConnection] = {}

    def add(self, envoy: EnvoyConnection) -> None:
        self._connections[envoy.status.number] = envoy
        self.notifier.notify_all()

    def remove(self, envoy: EnvoyConnection) -> None:
        self._connections.pop(envoy.status.number, None)
        self.notifier.notify_all()

    def list_all(self, service: str | None = None) -> list[EnvoyStatus]:
        return [
            replace(envoy.status, sidecar=self.sidecar_name)
            for envoy in self._connections.values()
            if service in {None, envoy.status.service}
        ]

    def count_by_service(self) -> dict[str, int]:
        return Counter(envoy.status.service for envoy in self._connections.values())

    async def wait_acknowledged(self, traffic: Traffic, timeout_s: float) -> None:
        """Wait until every Envoy of the service has answered, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(
                    envoy.status.has_answered(traffic)
                    for envoy in self._connections.values()
                    if envoy.status.service == traffic.service
                ):
                    await self.notifier.wait()


@dataclass(frozen=True, slots=True)
class EnvoyFleet:
    """The Envoys of one service. `peers_error` says why those of other sidecars are missing, empty if they are not."""

    envoys: Sequence[EnvoyStatus]
    peers_error: str = ""

    def have_all_answered(self, traffic: Traffic) -> bool:
        return all(envoy.has_answered(traffic) for envoy in self.envoys)

    @property
    def rules(self) -> list[SampleRule]:
        """Return the sampling rules in the files of the Envoys, one for each name."""
        rules: dict[str, SampleRule] = {}
        for envoy in self.sorted:
            for rule in envoy.rules:
                rules.setdefault(rule.name, rule)
        return list(rules.values())

    @property
    def sorted(self) -> list[EnvoyStatus]:
        return sorted(self.envoys, key=lambda envoy: (envoy.node, envoy.sidecar, envoy.number))


class EnvoyRegistry:
    def __init__(self, database: Database, connections: EnvoyConnections) -> None:
        self._database = database
        self._connections = connections
        self._id = str(uuid.uuid4())
        self._notifier = Notifier()
        self._notification_count = 0
        self._error = "not reached yet"
        self._published_at = 0.0  # monotonic

    @property
    def error(self) -> str:
        """Return why the last heartbeat did not reach Postgres, empty if it did."""
        delay_s = time.monotonic() - self._published_at
        if not self._error and delay_s > REPLICA_HEARTBEAT_S + MAX_HEARTBEAT_DELAY_S:
            return f"postgres has not answered for {delay_s:.0f} s"
        return self._error

    async def handle_notification(self) -> None:
        """Wake the calls that wait for Envoys of other sidecars."""
        self._notification_count += 1
        self._notifier.notify_all()

    def list_local(self, service: str, peers_error: str) -> EnvoyFleet:
        return EnvoyFleet(self._connections.list_all(service), peers_error)

    async def list_all(self, service: str) -> EnvoyFleet:
        params = {"id": self._id, "service": service, "expires": REPLICA_EXPIRY_S}
        query = asyncio.create_task(self._database.fetch_all("sidecar_envoys", params))
        if error := await error_within(query):
            return self.list_local(service, error)
        peers = [EnvoyStatus(**{**row, "rules": read_rules(row["rules"], row["node"])}) for row in query.result()]
        return EnvoyFleet([*self._connections.list_all(service), *peers])

    async def wait_acknowledged(self, traffic: Traffic, timeout_s: float) -> EnvoyFleet:
        """Return once every Envoy of every sidecar has answered, after `timeout_s`, or if the peers can't be read."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        await self._connections.wait_acknowledged(traffic, timeout_s)
        while True:
            notification_count = self._notification_count
            fleet = await self.list_all(traffic.service)
            if fleet.peers_error or fleet.have_all_answered(traffic) or clock() >= deadline:
                return fleet
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    while self._notification_count == notification_count:
                        await self._notifier.wait()

    async def run(self, stop: asyncio.Event) -> None:
        """Publish the Envoys of this sidecar until `stop` is set and the connections' notifier wakes this task."""
        outage = Outage("postgres", by="envoys")
        try:
            while not stop.is_set():
                try:
                    await self._publish(stop)
                    outage.record_success()
                except LedgerError as error:
                    self._error = str(error)
                    outage.record_failure(error)
                    await outage.back_off(stop)
        finally:
            await error_within(asyncio.create_task(self._database.execute("sidecar_delete", {"id": self._id})))

    async def _publish(self, stop: asyncio.Event) -> None:
        """Write every change, and a heartbeat every REPLICA_HEARTBEAT_S."""
        published: list[EnvoyStatus] | None = None
        while not stop.is_set():
            statuses = self._connections.list_all()
            values = {
                "id": self._id,
                "address": self._connections.sidecar_name,
                "expires": REPLICA_EXPIRY_S,
                "envoys": to_json(list(map(_to_document, statuses))),
                "changed": statuses != published,
                "starts": published is None,
            }
            await self._database.execute("sidecar_set", values)
            self._error, self._published_at = "", time.monotonic()
            published = statuses
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLICA_HEARTBEAT_S):
                    while self._connections.list_all() == published and not stop.is_set():
                        await self._connections.notifier.wait()


def _to_document(envoy: EnvoyStatus) -> dict[str, Any]:
    document = asdict(envoy) | {"rules": [rule.to_mapping() for rule in envoy.rules]}
    del document["sidecar"]  # a column of the row
    return document | {name: sanitise_text(document[name], MAX_ENVOY_TEXT_CHARS) for name in ("node", "error")}


def read_rules(document: Any, node: str) -> tuple[SampleRule, ...]:
    """Read the sampling rules of an Envoy. If they are not valid here, it has none, and still gets the other settings."""
    try:
        return parse_rules(document)
    except (ValueError, TypeError) as error:
        log.warning("the sampling rules of an envoy can't be read", node=node, error=str(error))
        return ()
