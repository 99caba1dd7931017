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

from abreast_sidecar.aio import OPTIONAL_CALL_TIMEOUT_S, error_within
from abreast_sidecar.errors import LedgerError, NotFoundError, RedisError
from abreast_sidecar.redis_client import map_redis_errors
from abreast_sidecar.traffic.model import AuditNote, Shares
from abreast_sidecar.traffic.repository import TrafficRepository, VersionedTraffic

ROLLBACKS_HASH_KEY = "abreast:rollbacks"  # in Redis: call → JSON
ROLLBACK_POLL_INTERVAL_S = 1.0  # seconds between two looks

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PendingRollback:
    service: str
    note: AuditNote
    call_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    called_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    started_monotonic: float = field(default_factory=time.monotonic)

    @property
    def late_note(self) -> AuditNote:
        suffix = f"(called at {self.called_at}, while Postgres was away)"
        return AuditNote(self.note.actor, f"{self.note.reason} {suffix}".strip())

    def to_json(self) -> str:
        return json.dumps(
            {"service": self.service, "actor": self.note.actor, "reason": self.note.reason, "at": self.called_at}
        )

    @classmethod
    def from_json(cls, call_id: bytes, document: bytes) -> PendingRollback:
        values = json.loads(document)
        return cls(values["service"], AuditNote(values["actor"], values["reason"]), call_id.decode(), values["at"])


class PendingRollbacks:
    """`learn` takes a state of the ledger; `changed` is called where what is in force changed."""

    def __init__(
        self,
        repository: TrafficRepository,
        redis: Redis,
        default_shares: Shares,
        *,
        observe: Callable[[VersionedTraffic], None],
        on_change: Callable[[], None],
    ) -> None:
        self.is_loaded = asyncio.Event()  # whether others have left rollbacks is known, or can't be
        self._repository = repository
        self._redis = redis
        self._initial_shares = replace(default_shares, new_share=0)  # of a service that the ledger has never heard of
        self._observe = observe
        self._on_change = on_change
        self._pending: dict[str, PendingRollback] = {}
        self._record_tasks: dict[str, asyncio.Task[None]] = {}
        self._recorded_ids: set[str] = set()
        self._owed_event_ids: set[str] = set()  # calls that were told that an event of them will be there
        self._redis_ids: set[str] = set()  # in Redis, and to be removed there

    def get(self, service: str) -> PendingRollback | None:
        """The first that holds the service."""
        return next((rollback for rollback in self._pending.values() if rollback.service == service), None)

    def list_services(self) -> set[str]:
        return {rollback.service for rollback in self._pending.values()}

    async def add(self, service: str, note: AuditNote) -> str:
        """In force before anything is waited for. Return what is amiss, empty where the ledger has it."""
        rollback = PendingRollback(service, note)
        self._add(rollback)
        problem = await self._try_record(rollback, is_late=False)
        if not problem or rollback.call_id in self._recorded_ids:
            return ""
        self._owed_event_ids.add(rollback.call_id)
        log.warning("a rollback is in force and not recorded", service=service, error=problem)
        if await self._store_in_redis(rollback):
            propagation = "other sidecars find it in Redis within seconds, and it outlives a restart of this one"
        else:
            propagation = "Redis does not keep it either, so Envoys of other sidecars are not told, and a restart of this one forgets it"
        return (
            f"the ledger does not know of it yet: {problem}; it is recorded as soon as Postgres is back; {propagation}"
        )

    async def flush(self, service: str) -> None:
        """Record what holds the service, or raise LedgerError."""
        while rollback := self.get(service):
            if problem := await self._try_record(rollback, is_late=True):
                raise LedgerError(f"a rollback is still to be recorded, and nothing may overtake it: {problem}")

    async def run(self) -> None:
        while True:
            await self._load_from_redis()
            self.is_loaded.set()
            for rollback in list(self._pending.values()):
                self._schedule_record(rollback, is_late=True)
            await self._delete_from_redis()
            await asyncio.sleep(ROLLBACK_POLL_INTERVAL_S)

    def _add(self, rollback: PendingRollback) -> None:
        self._pending[rollback.call_id] = rollback
        self._on_change()

    async def _try_record(self, rollback: PendingRollback, *, is_late: bool) -> str:
        return await error_within(self._schedule_record(rollback, is_late=is_late))

    def _schedule_record(self, rollback: PendingRollback, *, is_late: bool) -> asyncio.Task[None]:
        task = self._record_tasks.get(rollback.call_id)
        if task is None or task.done():
            task = self._record_tasks[rollback.call_id] = asyncio.create_task(self._record(rollback, is_late=is_late))
            task.add_done_callback(lambda future: future.cancelled() or future.exception())  # it is tried again
        return task

    async def _record(self, rollback: PendingRollback, *, is_late: bool) -> None:
        note = rollback.late_note if is_late else rollback.note
        try:
            snapshot = await self._repository.record_rollback(
                rollback.service, note, rollback.call_id, always_record_event=is_late
            )
        except NotFoundError:
            await self._repository.ensure(
                rollback.service, self._initial_shares, AuditNote("sidecar", "a rollback named this service")
            )
            snapshot = await self._repository.record_rollback(
                rollback.service, note, rollback.call_id, always_record_event=is_late
            )
        if (
            not is_late and rollback.call_id in self._owed_event_ids
        ):  # it had begun before; where it changed nothing, it left no event
            snapshot = await self._repository.record_rollback(
                rollback.service, rollback.late_note, rollback.call_id, always_record_event=True
            )
        self._owed_event_ids.discard(rollback.call_id)
        self._recorded_ids.add(rollback.call_id)
        self._observe(snapshot)
        self._pending.pop(rollback.call_id, None)
        self._record_tasks.pop(rollback.call_id, None)
        self._on_change()
        if is_late:
            log.info("a rollback is recorded now", service=rollback.service, version=snapshot.traffic.version)

    async def _store_in_redis(self, rollback: PendingRollback) -> bool:
        try:
            await self._call_redis(self._redis.hset(ROLLBACKS_HASH_KEY, rollback.call_id, rollback.to_json()))
        except RedisError as error:
            log.warning("a rollback is kept in memory only", service=rollback.service, error=str(error))
            return False
        self._redis_ids.add(rollback.call_id)
        return True

    async def _load_from_redis(self) -> None:
        """Take over what others have left. Where Postgres answers it is only recorded: it may be long over."""
        try:
            documents = await self._call_redis(self._redis.hgetall(ROLLBACKS_HASH_KEY))
        except RedisError:
            return
        for call_id, document in documents.items():
            try:
                rollback = PendingRollback.from_json(call_id, document)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("redis holds a rollback that can't be read", error=repr(error))
                continue
            self._redis_ids.add(rollback.call_id)
            if rollback.call_id in self._recorded_ids or rollback.call_id in self._pending:
                continue
            if await self._try_record(rollback, is_late=True):
                self._add(rollback)

    async def _delete_from_redis(self) -> None:
        for call_id in self._redis_ids & self._recorded_ids:
            try:
                await self._call_redis(self._redis.hdel(ROLLBACKS_HASH_KEY, call_id))
            except RedisError:
                return
            self._redis_ids.discard(call_id)

    async def _call_redis(self, command: Any) -> Any:
        with map_redis_errors():
            async with asyncio.timeout(OPTIONAL_CALL_TIMEOUT_S):
                return await command
