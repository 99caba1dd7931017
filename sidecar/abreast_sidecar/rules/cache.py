"""The rules that hold, kept up to date from Postgres. Without having read them once there are none to go by."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.store.database import Database, listen
from abreast_sidecar.store.rules import RULES_CHANNEL, RuleStore, VersionedRules

log = structlog.get_logger(__name__)


class RuleCache:
    def __init__(self, database: Database, rules: CompareOptions, *, direct_url: str = "") -> None:
        """`rules`: options from settings. `direct_url`: Postgres without a pooler, for notifications."""
        self._direct_url = direct_url or database.conninfo
        self._store = RuleStore(database)
        self._rules = rules
        self._loaded = asyncio.Event()
        self._listener_task: asyncio.Task[None] | None = None
        self.version = -1

    @property
    def rules(self) -> CompareOptions:
        return self._rules

    def start(self) -> None:
        self._listener_task = asyncio.create_task(
            listen(self._direct_url, {RULES_CHANNEL: self.refresh}, name="abreast rules")
        )

    async def close(self) -> None:
        if self._listener_task is not None:
            await cancel_and_wait(self._listener_task)

    async def wait_loaded(self, stop: asyncio.Event) -> bool:
        """Wait until the rules were read, or for `stop`; say which."""
        tasks = [asyncio.create_task(event.wait()) for event in (self._loaded, stop)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*tasks)
        return self._loaded.is_set()

    async def refresh(self) -> None:
        """Raise LedgerError while Postgres is away; what is known stays."""
        self._apply(await self._store.get_active())

    def _apply(self, current: VersionedRules) -> None:
        if current.version <= self.version:
            return
        self._rules = replace(self._rules, rule_set=current.rules)
        self.version = current.version
        self._loaded.set()
        log.info("rules", version=current.version, rules=len(current.rules.rules))
