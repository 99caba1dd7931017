"""The Envoys that are connected to this sidecar, and what each has acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

from abreast_sidecar.control.bell import Bell
from abreast_sidecar.control.traffic import Traffic

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class EnvoyState:
    node: str
    acknowledged_version: int  # 0 for none yet
    acknowledged_after: float | None  # seconds from the change, or from the connection where that came later
    error: str = ""  # why it refused the last settings that it was sent
    peer: str = ""


@dataclass
class Connected:
    """One discovery stream of one Envoy."""

    node: str
    service: str
    peer: str = ""
    number: int = field(default_factory=lambda: next(_numbers))
    since: float = field(default_factory=time.monotonic)
    sent: Traffic | None = None
    sent_from: float = 0.0  # monotonic: when that state was set
    sendings: int = 0
    acknowledged: Traffic | None = None
    acknowledged_after: float | None = None
    error: str = ""

    @property
    def nonce(self) -> str:
        return f"{self.number}.{self.sendings}"

    def sending(self, traffic: Traffic, changed: float) -> None:
        self.sent = traffic
        self.sendings += 1
        self.sent_from = max(changed, self.since)

    def answered(self, nonce: str, error: str) -> bool:
        """Whether the answer is about the state that was sent last."""
        if self.sent is None or nonce != self.nonce:
            return False
        self.error = error
        if not error:
            self.acknowledged = self.sent
            self.acknowledged_after = time.monotonic() - self.sent_from
        return True

    def settled(self, traffic: Traffic) -> bool:
        """Whether this Envoy has the state or a later one, or has refused it."""
        answered = self.sent if self.error else self.acknowledged
        return answered is not None and not traffic.newer_than(answered)

    def state(self, traffic: Traffic | None) -> EnvoyState:
        current = self.acknowledged is not None and self.acknowledged == traffic
        return EnvoyState(
            node=self.node,
            acknowledged_version=self.acknowledged.version if self.acknowledged else 0,
            acknowledged_after=self.acknowledged_after if current else None,
            error=self.error,
            peer=self.peer,
        )


class Envoys:
    """Every stream counts, also where Envoys share a node id: each holds values of its own. One whose Envoy went away
    without a word ends when the server's keepalive finds out.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Connected] = {}
        self.bell = Bell()  # an Envoy came, went or answered

    def add(self, envoy: Connected) -> None:
        self._streams[envoy.number] = envoy
        self.bell.ring()

    def remove(self, envoy: Connected) -> None:
        self._streams.pop(envoy.number, None)
        self.bell.ring()

    def of(self, service: str) -> list[Connected]:
        found = (envoy for envoy in self._streams.values() if envoy.service == service)
        return sorted(found, key=lambda envoy: (envoy.node, envoy.number))

    def counts(self) -> dict[str, int]:
        return Counter(envoy.service for envoy in self._streams.values())

    async def wait_settled(self, traffic: Traffic, timeout: float) -> None:
        """Until every Envoy of the service has answered, or the time (seconds) is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not all(envoy.settled(traffic) for envoy in self.of(traffic.service)):
                    await self.bell.wait()
