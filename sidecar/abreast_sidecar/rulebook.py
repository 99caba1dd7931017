"""The rules that hold, kept up to date from Postgres. Without having read them once there are none to go by."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from abreast_sidecar.compare import Rules
from abreast_sidecar.ending import ended
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.follow import follow
from abreast_sidecar.store.rules import CHANNEL, InForce, RuleStore

log = structlog.get_logger(__name__)


class Rulebook:
    def __init__(self, conninfo: str, rules: Rules, *, session: str = "") -> None:
        """`rules`: what is set apart from what people declared. `session`: Postgres without a pooler, to be told."""
        self._session = session or conninfo
        self._database = Database(conninfo)
        self._store = RuleStore(self._database)
        self._rules = rules
        self._known = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self.version = -1

    @property
    def rules(self) -> Rules:
        return self._rules

    async def open(self) -> None:
        await self._database.open()
        self._following = asyncio.create_task(
            follow(self._session, {CHANNEL: self.refresh}, name="abreast rules")
        )

    async def close(self) -> None:
        if self._following is not None:
            await ended(self._following)
        await self._database.close()

    async def known(self, stop: asyncio.Event) -> bool:
        """Wait until the rules were read, or for `stop`; say which."""
        waits = [asyncio.create_task(event.wait()) for event in (self._known, stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await ended(*waits)
        return self._known.is_set()

    async def refresh(self) -> None:
        """Raise LedgerError while Postgres is away; what is known stays."""
        self._learn(await self._store.in_force())

    def _learn(self, found: InForce) -> None:
        if found.version <= self.version:
            return
        self._rules = replace(self._rules, declared=found.rules)
        self.version = found.version
        self._known.set()
        log.info("rules", version=found.version, rules=len(found.rules.rules))
