"""The Envoys that are connected to this sidecar, and what each has acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

from abreast_sidecar.control.bell import Notifier
from abreast_sidecar.control.traffic import Traffic, VersionStamp

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
            envoy.has_answered(traffic)
            for envoy in self._connections.values()
            if envoy.service == traffic.service
        )
