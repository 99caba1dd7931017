"""Rollbacks that are in force and not yet recorded in Postgres.

A rollback is in force in memory from the call on. While Postgres is away it is also stored in Redis: it outlives this
process, and other sidecars find it and roll back their Envoys too. Every sidecar records it once it reaches Postgres, and
the id of the call makes that a single event. Only its record ends a rollback, so older settings from Postgres can't
undo it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
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
from abreast_sidecar.traffic.state import TrafficState

ROLLBACKS_HASH_KEY = "abreast:rollbacks"  # in Redis: id of the call → JSON
ROLLBACK_POLL_INTERVAL_S = 1.0

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
    """Writes settings that it recorded to `state`, and wakes the state's notifier when a rollback begins or ends."""

    def __init__(
        self, repository: TrafficRepository, redis: Redis, state: TrafficState, default_shares: Shares
    ) -> None:
        self.is_loaded = asyncio.Event()  # set after the first attempt to read the rollbacks of other sidecars
        self._repository = repository
        self._redis = redis
        self._state = state
        self._initial_shares = replace(default_shares, new_share=0)  # for a service that Postgres does not know
        self._pending: dict[str, PendingRollback] = {}
        self._record_tasks: dict[str, asyncio.Task[None]] = {}
        self._recorded_ids: set[str] = set()
        self._owed_event_ids: set[str] = set()  # calls whose answer promised an event
        self._redis_ids: set[str] = set()  # stored in Redis, to be deleted once recorded

    def get(self, service: str) -> PendingRollback | None:
        """Return the oldest pending rollback of the service."""
        return next((rollback for rollback in self._pending.values() if rollback.service == service), None)

    def list_services(self) -> set[str]:
        return {rollback.service for rollback in self._pending.values()}

    async def add(self, service: str, note: AuditNote) -> str:
        """Put a rollback in force, then try to record it. Return why it is not recorded, empty if it is."""
        rollback = PendingRollback(service, note)
        self._put_in_force(rollback)
        problem = await error_within(self._schedule_record(rollback, is_late=False))
        if not problem or rollback.call_id in self._recorded_ids:
            return ""
        self._owed_event_ids.add(rollback.call_id)
        log.warning("a rollback is in force and not recorded", service=service, error=problem)
        if await self._store_in_redis(rollback):
            propagation = "other sidecars find it in Redis within seconds, and it outlives a restart of this sidecar"
        else:
            propagation = (
                "Redis does not store it either, so Envoys of other sidecars are not rolled back, and a restart of this"
                " sidecar forgets it"
            )
        return f"the rollback is not recorded: {problem}; it is recorded as soon as Postgres is back; {propagation}"

    async def flush(self, service: str) -> None:
        """Record the pending rollbacks of the service. Raise LedgerError if that fails."""
        while rollback := self.get(service):
            if problem := await error_within(self._schedule_record(rollback, is_late=True)):
                raise LedgerError(f"a rollback must be recorded before any other change: {problem}")

    async def run(self) -> None:
        """Record rollbacks of this and other sidecars, also before Postgres was ever reached."""
        while True:
            await self._load_from_redis()
            self.is_loaded.set()
            for rollback in list(self._pending.values()):
                self._schedule_record(rollback, is_late=True)
            await self._delete_from_redis()
            await asyncio.sleep(ROLLBACK_POLL_INTERVAL_S)

    def _put_in_force(self, rollback: PendingRollback) -> None:
        self._pending[rollback.call_id] = rollback
        self._state.notifier.notify_all()

    def _schedule_record(self, rollback: PendingRollback, *, is_late: bool) -> asyncio.Task[None]:
        task = self._record_tasks.get(rollback.call_id)
        if task is None or task.done():
            task = self._record_tasks[rollback.call_id] = asyncio.create_task(self._record(rollback, is_late=is_late))
            task.add_done_callback(lambda future: future.cancelled() or future.exception())  # `run` retries
        return task

    async def _record(self, rollback: PendingRollback, *, is_late: bool) -> None:
        snapshot = await self._write_record(rollback, is_late=is_late)
        if not is_late and rollback.call_id in self._owed_event_ids:
            # The write began before the promise, and a rollback that changes nothing leaves no event by default.
            snapshot = await self._write_record(rollback, is_late=True)
        self._owed_event_ids.discard(rollback.call_id)
        self._recorded_ids.add(rollback.call_id)
        self._state.observe(snapshot)  # before the rollback ends, so that older settings are never in force again
        self._pending.pop(rollback.call_id, None)
        self._record_tasks.pop(rollback.call_id, None)
        self._state.notifier.notify_all()
        if is_late:
            log.info("a pending rollback was recorded", service=rollback.service, version=snapshot.traffic.version)

    async def _write_record(self, rollback: PendingRollback, *, is_late: bool) -> VersionedTraffic:
        note = rollback.late_note if is_late else rollback.note
        for _ in range(2):
            try:
                return await self._repository.record_rollback(
                    rollback.service, note, rollback.call_id, always_record_event=is_late
                )
            except NotFoundError:
                creation_note = AuditNote("sidecar", "a rollback named this service")
                await self._repository.ensure(rollback.service, self._initial_shares, creation_note)
        raise LedgerError(f"the settings of {rollback.service} were deleted while a rollback was recorded")

    async def _store_in_redis(self, rollback: PendingRollback) -> bool:
        try:
            await self._call_redis(self._redis.hset(ROLLBACKS_HASH_KEY, rollback.call_id, rollback.to_json()))
        except RedisError as error:
            log.warning("a rollback is stored in memory only", service=rollback.service, error=str(error))
            return False
        self._redis_ids.add(rollback.call_id)
        return True

    async def _load_from_redis(self) -> None:
        """Take over the rollbacks of other sidecars. With Postgres at hand they are only recorded: they may be old."""
        try:
            documents = await self._call_redis(self._redis.hgetall(ROLLBACKS_HASH_KEY))
        except RedisError:
            return
        for call_id, document in documents.items():
            try:
                rollback = PendingRollback.from_json(call_id, document)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("redis holds an unreadable rollback", error=repr(error))
                continue
            self._redis_ids.add(rollback.call_id)
            if rollback.call_id in self._recorded_ids or rollback.call_id in self._pending:
                continue
            if await error_within(self._schedule_record(rollback, is_late=True)):
                self._put_in_force(rollback)

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
