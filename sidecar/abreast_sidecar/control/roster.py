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

from abreast_sidecar.control.bell import Bell
from abreast_sidecar.control.envoys import Envoys, EnvoyState, Standing
from abreast_sidecar.control.patience import trouble
from abreast_sidecar.control.traffic import Moment, Traffic
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.outage import Outage
from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import Database, Row

CHANNEL = "abreast_envoys"  # NOTIFY
BEAT = 1.0  # seconds between two signs of life
EXPIRES = 5.0  # seconds after the last one
LONGEST = 500  # characters of a name or an error


@dataclass(frozen=True, slots=True)
class Roll:
    """Who is connected to any sidecar. `unknown`: why those of other sidecars are not among them; empty where they are."""

    envoys: Sequence[Standing]
    unknown: str = ""

    def settled(self, traffic: Traffic) -> bool:
        return all(envoy.settled(traffic) for envoy in self.envoys)

    @property
    def several(self) -> bool:
        """Whether more than one sidecar has some."""
        return len({envoy.sidecar for envoy in self.envoys}) > 1

    def states(self, traffic: Traffic) -> list[EnvoyState]:
        ordered = sorted(self.envoys, key=lambda envoy: (envoy.node, envoy.sidecar, envoy.number))
        return [envoy.state(traffic) for envoy in ordered]


class Roster:
    def __init__(self, database: Database, envoys: Envoys) -> None:
        self._reading = database
        self._writing = Database(database.conninfo)  # long queries of others must not hold up a sign of life
        self._envoys = envoys
        self._id = str(uuid.uuid4())
        self._bell = Bell()
        self._heard = 0

    async def hear(self) -> None:
        """Others have told something."""
        self._heard += 1
        self._bell.ring()

    def here(self, service: str, unknown: str) -> Roll:
        return Roll(self._envoys.of(service), unknown)

    async def all(self, service: str) -> Roll:
        reading = asyncio.create_task(self._others(service))
        if amiss := await trouble(reading):
            return self.here(service, amiss)
        return Roll([*self._envoys.of(service), *reading.result()])

    async def settled(self, traffic: Traffic, wait: float) -> Roll:
        """Once every Envoy of every sidecar has answered, or `wait` seconds are over, or others can't be asked."""
        clock = asyncio.get_running_loop().time
        end = clock() + wait
        await self._envoys.wait_settled(traffic, wait)
        while True:
            heard = self._heard
            found = await self.all(traffic.service)
            if found.unknown or found.settled(traffic) or clock() >= end:
                return found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    while self._heard == heard:
                        await self._bell.wait()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep what is connected here. Return once `stop` is set, and the envoys' bell rung."""
        outage = Outage("postgres", by="roster")
        await self._writing.open()
        try:
            while not stop.is_set():
                try:
                    await self._keep(stop)
                    outage.end()
                except LedgerError as error:
                    outage.begin(error)
                    await outage.wait(stop)
        finally:
            await self._leave()
            await self._writing.close()

    async def _keep(self, stop: asyncio.Event) -> None:
        """Write what is new, and once a BEAT that this sidecar is alive."""
        kept: list[Standing] | None = None
        while not stop.is_set():
            present = self._envoys.all()
            values = {"id": self._id, "address": self._envoys.sidecar, "expires": EXPIRES}
            told = {
                "envoys": json_text(list(map(document, present))).decode(),
                "changed": present != kept,
                "starts": kept is None,
            }
            await self._writing.execute("sidecar_set", values | told)
            kept = present
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT):
                    while self._envoys.all() == kept and not stop.is_set():
                        await self._envoys.bell.wait()

    async def _leave(self) -> None:
        leaving = asyncio.create_task(self._writing.execute("sidecar_delete", {"id": self._id}))
        await trouble(leaving)

    async def _others(self, service: str) -> list[Standing]:
        asked = {"id": self._id, "service": service, "expires": EXPIRES}
        return [standing(row) for row in await self._reading.rows("sidecar_envoys", asked)]


def document(envoy: Standing) -> dict[str, Any]:
    acknowledged, answered = envoy.acknowledged, envoy.answered
    return {
        "service": envoy.service,
        "node": clean(envoy.node, LONGEST),
        "peer": envoy.peer,
        "number": envoy.number,
        "acknowledged_at": acknowledged and acknowledged[0].isoformat(),
        "acknowledged_version": acknowledged and acknowledged[1],
        "answered_at": answered and answered[0].isoformat(),
        "answered_version": answered and answered[1],
        "after": envoy.after,
        "error": clean(envoy.error, LONGEST),
    }


def standing(row: Row) -> Standing:
    def moment(name: str) -> Moment | None:
        at = row[f"{name}_at"]
        return None if at is None else (at, row[f"{name}_version"])

    same = {name: row[name] for name in ("service", "node", "peer", "number", "after", "error", "sidecar")}
    return Standing(acknowledged=moment("acknowledged"), answered=moment("answered"), **same)
