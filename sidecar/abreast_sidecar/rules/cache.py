"""Caches the rules in force and follows their changes in Postgres."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.store.database import Database, listen
from abreast_sidecar.store.rules import RULES_CHANNEL, RuleStore

log = structlog.get_logger(__name__)


class RuleCache:
    """The rules in force. `version` is -1 until they are read once; until then, don't compare."""

    def __init__(self, database: Database, rules: CompareOptions, *, direct_url: str = "") -> None:
        """Take compare options without rules. `direct_url`: Postgres without a pooler, for notifications."""
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
        """Wait until the rules are read, or for `stop`; return whether they are read."""
        tasks = [asyncio.create_task(event.wait()) for event in (self._loaded, stop)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*tasks)
        return self._loaded.is_set()

    async def refresh(self) -> None:
        """Read the rules. Raise LedgerError while Postgres is away; the cached rules stay."""
        current = await self._store.get_active()
        if current.version <= self.version:
            return
        self._rules = replace(self._rules, rule_set=current.rules)
        self.version = current.version
        self._loaded.set()
        log.info("rules read", version=current.version, rules=len(current.rules.rules))
