"""The Envoys that are connected to this sidecar, and what each has acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

from abreast_sidecar.control.bell import Bell
from abreast_sidecar.control.traffic import Moment, Traffic

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class EnvoyState:
    node: str
    acknowledged_version: int  # 0 for none yet
    acknowledged_after: float | None  # seconds from the change, or from the connection where that came later
    error: str = ""  # why it refused the last settings that it was sent
    peer: str = ""
    sidecar: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one Envoy stands, whichever sidecar it is connected to."""

    service: str
    node: str
    peer: str
    number: int  # in the order of connecting
    acknowledged: Moment | None
    answered: Moment | None  # what it acknowledged or refused last
    after: float | None  # seconds, of what it acknowledged
    error: str
    sidecar: str = ""

    def settled(self, traffic: Traffic) -> bool:
        """Whether this Envoy has the state or a later one, or has refused it."""
        return self.answered is not None and self.answered >= traffic.moment

    def state(self, traffic: Traffic) -> EnvoyState:
        return EnvoyState(
            node=self.node,
            acknowledged_version=self.acknowledged[1] if self.acknowledged else 0,
            acknowledged_after=self.after if self.acknowledged == traffic.moment else None,
            error=self.error,
            peer=self.peer,
            sidecar=self.sidecar,
        )


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

    @property
    def last_answered(self) -> Traffic | None:
        return self.sent if self.error else self.acknowledged

    def settled(self, traffic: Traffic) -> bool:
        """As `Standing.settled`, for many Envoys at each of their answers."""
        answered = self.last_answered
        return answered is not None and not traffic.newer_than(answered)

    def standing(self, sidecar: str) -> Standing:
        answered = self.last_answered
        return Standing(
            service=self.service,
            node=self.node,
            peer=self.peer,
            number=self.number,
            acknowledged=self.acknowledged.moment if self.acknowledged else None,
            answered=answered.moment if answered else None,
            after=self.acknowledged_after,
            error=self.error,
            sidecar=sidecar,
        )


class Envoys:
    """Every stream counts, also where Envoys share a node id: each holds values of its own. One whose Envoy went away
    without a word ends when the server's keepalive finds out.
    """

    def __init__(self) -> None:
        self.sidecar = ""  # what this one is called
        self.bell = Bell()  # an Envoy came, went or answered
        self._streams: dict[int, Connected] = {}

    def add(self, envoy: Connected) -> None:
        self._streams[envoy.number] = envoy
        self.bell.ring()

    def remove(self, envoy: Connected) -> None:
        self._streams.pop(envoy.number, None)
        self.bell.ring()

    def all(self) -> list[Standing]:
        return [envoy.standing(self.sidecar) for envoy in self._streams.values()]

    def of(self, service: str) -> list[Standing]:
        return [envoy for envoy in self.all() if envoy.service == service]

    def states(self, traffic: Traffic) -> list[EnvoyState]:
        return [envoy.state(traffic) for envoy in self.of(traffic.service)]

    def counts(self) -> dict[str, int]:
        return Counter(envoy.service for envoy in self._streams.values())

    async def wait_settled(self, traffic: Traffic, timeout: float) -> None:
        """Until every Envoy of the service here has answered, or the time (seconds) is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self._settled(traffic):
                    await self.bell.wait()

    def _settled(self, traffic: Traffic) -> bool:
        return all(
            envoy.settled(traffic) for envoy in self._streams.values() if envoy.service == traffic.service
        )
