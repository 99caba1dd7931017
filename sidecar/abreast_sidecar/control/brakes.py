"""Rollbacks in force: from the call on in memory, until the ledger has recorded them.

While Postgres is away a rollback is also kept in Redis. There it outlives this process, and other sidecars find it and
roll their Envoys back too. Each of them records it once it reaches Postgres; the call's id makes that one event. None is
lifted by anything but its record, so no older state from Postgres can undo it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import structlog
from redis.asyncio import Redis

from abreast_sidecar.control.journal import Journal, Known
from abreast_sidecar.control.patience import PATIENCE, trouble
from abreast_sidecar.control.traffic import Note, Shares
from abreast_sidecar.errors import LedgerError, NotFoundError, RedisError
from abreast_sidecar.read import translated

HASH = "abreast:rollbacks"  # in Redis: call → JSON
PERIOD = 1.0  # seconds between two looks

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Brake:
    service: str
    note: Note
    call: str = field(default_factory=lambda: str(uuid.uuid4()))
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    pulled: float = field(default_factory=time.monotonic)

    @property
    def late_note(self) -> Note:
        late = f"(called at {self.at}, while Postgres was away)"
        return Note(self.note.actor, f"{self.note.reason} {late}".strip())

    def document(self) -> str:
        return json.dumps(
            {"service": self.service, "actor": self.note.actor, "reason": self.note.reason, "at": self.at}
        )

    @classmethod
    def parse(cls, call: bytes, document: bytes) -> Brake:
        said = json.loads(document)
        return cls(said["service"], Note(said["actor"], said["reason"]), call.decode(), said["at"])


class Brakes:
    """`learn` takes a state of the ledger; `changed` is called where what is in force changed."""

    def __init__(
        self,
        journal: Journal,
        redis: Redis,
        initial: Shares,
        *,
        learn: Callable[[Known], None],
        changed: Callable[[], None],
    ) -> None:
        self.looked = asyncio.Event()  # whether others have left rollbacks is known, or can't be
        self._journal = journal
        self._redis = redis
        self._first = replace(initial, new_share=0)  # of a service that the ledger has never heard of
        self._learn = learn
        self._changed = changed
        self._pulled: dict[str, Brake] = {}
        self._recording: dict[str, asyncio.Task[None]] = {}
        self._recorded: set[str] = set()
        self._owed: set[str] = set()  # calls that were told that an event of them will be there
        self._kept: set[str] = set()  # in Redis, and to be removed there

    def on(self, service: str) -> Brake | None:
        """The first that holds the service."""
        return next((one for one in self._pulled.values() if one.service == service), None)

    def services(self) -> set[str]:
        return {brake.service for brake in self._pulled.values()}

    async def pull(self, service: str, note: Note) -> str:
        """In force before anything is waited for. Return what is amiss, empty where the ledger has it."""
        brake = Brake(service, note)
        self._pull(brake)
        trouble = await self._try(brake, late=False)
        if not trouble or brake.call in self._recorded:
            return ""
        self._owed.add(brake.call)
        log.warning("a rollback is in force and not recorded", service=service, error=trouble)
        if await self._keep(brake):
            others = "other sidecars find it in Redis within seconds, and it outlives a restart of this one"
        else:
            others = "Redis does not keep it either, so Envoys of other sidecars are not told, and a restart of this one forgets it"
        return f"the ledger does not know of it yet: {trouble}; it is recorded as soon as Postgres is back; {others}"

    async def settle(self, service: str) -> None:
        """Record what holds the service, or raise LedgerError."""
        while brake := self.on(service):
            if trouble := await self._try(brake, late=True):
                raise LedgerError(
                    f"a rollback is still to be recorded, and nothing may overtake it: {trouble}"
                )

    async def run(self) -> None:
        while True:
            await self._look()
            self.looked.set()
            for brake in list(self._pulled.values()):
                self._record_soon(brake, late=True)
            await self._remove()
            await asyncio.sleep(PERIOD)

    def _pull(self, brake: Brake) -> None:
        self._pulled[brake.call] = brake
        self._changed()

    async def _try(self, brake: Brake, *, late: bool) -> str:
        return await trouble(self._record_soon(brake, late=late))

    def _record_soon(self, brake: Brake, *, late: bool) -> asyncio.Task[None]:
        task = self._recording.get(brake.call)
        if task is None or task.done():
            task = self._recording[brake.call] = asyncio.create_task(self._record(brake, late=late))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is tried again
        return task

    async def _record(self, brake: Brake, *, late: bool) -> None:
        note = brake.late_note if late else brake.note
        try:
            known = await self._journal.record_rollback(brake.service, note, brake.call, always=late)
        except NotFoundError:
            await self._journal.seed(
                brake.service, self._first, Note("sidecar", "a rollback named this service")
            )
            known = await self._journal.record_rollback(brake.service, note, brake.call, always=late)
        if (
            not late and brake.call in self._owed
        ):  # it had begun before; where it changed nothing, it left no event
            known = await self._journal.record_rollback(
                brake.service, brake.late_note, brake.call, always=True
            )
        self._owed.discard(brake.call)
        self._recorded.add(brake.call)
        self._learn(known)
        self._pulled.pop(brake.call, None)
        self._recording.pop(brake.call, None)
        self._changed()
        if late:
            log.info("a rollback is recorded now", service=brake.service, version=known.traffic.version)

    async def _keep(self, brake: Brake) -> bool:
        try:
            await self._ask(self._redis.hset(HASH, brake.call, brake.document()))
        except RedisError as error:
            log.warning("a rollback is kept in memory only", service=brake.service, error=str(error))
            return False
        self._kept.add(brake.call)
        return True

    async def _look(self) -> None:
        """Take over what others have left. Where Postgres answers it is only recorded: it may be long over."""
        try:
            found = await self._ask(self._redis.hgetall(HASH))
        except RedisError:
            return
        for call, document in found.items():
            try:
                brake = Brake.parse(call, document)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("redis holds a rollback that can't be read", error=repr(error))
                continue
            self._kept.add(brake.call)
            if brake.call in self._recorded or brake.call in self._pulled:
                continue
            if await self._try(brake, late=True):
                self._pull(brake)

    async def _remove(self) -> None:
        for call in self._kept & self._recorded:
            try:
                await self._ask(self._redis.hdel(HASH, call))
            except RedisError:
                return
            self._kept.discard(call)

    async def _ask(self, question: Any) -> Any:
        with translated():
            async with asyncio.timeout(PATIENCE):
                return await question
