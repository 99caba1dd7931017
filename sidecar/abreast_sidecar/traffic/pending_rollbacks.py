"""Rollbacks that are in force and not yet recorded in Postgres.

A rollback is in force in memory from the call on. While Postgres is away it is also stored in Redis: it outlives this
process, and other sidecars find it and roll back their Envoys too. Every sidecar records it once it reaches Postgres, and
the id of the call makes that a single event. Only its record ends a rollback, so older settings from Postgres can't
undo it.

All services can write to Redis. A stored rollback is therefore signed with a key that only the sidecars have. Its id is
the revision of the settings that it made, so a recorded one has no effect when someone stores it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from abreast.protocol.redis_client import is_cluster
from abreast_sidecar.aio import OPTIONAL_CALL_TIMEOUT_S, Notifier, error_within
from abreast_sidecar.errors import LedgerError, NotFoundError, RedisError
from abreast_sidecar.redis_client import map_redis_errors
from abreast_sidecar.traffic.model import AuditNote, InitialShares
from abreast_sidecar.traffic.repository import TrafficRepository

ROLLBACKS_HASH_KEY = "abreast:rollbacks"  # in Redis: id of the call → JSON
ROLLBACKS_CHANNEL = "abreast:rollbacks"  # announces changes of the hash
ROLLBACK_POLL_INTERVAL_S = 1.0  # without a subscription
SUBSCRIBED_POLL_INTERVAL_S = 5.0  # a connection that is lost silently delivers no message
SUBSCRIPTION_RETRY_S = 10.0
KEY_RETRY_DELAY_S = 0.1
REPLAY_GRACE_S = 10.0  # time for the sidecar that recorded a rollback to delete it

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

    def to_json(self, key: bytes) -> str:
        values = {"service": self.service, "actor": self.note.actor, "reason": self.note.reason, "at": self.called_at}
        return json.dumps({**values, "signature": self._sign(key)})

    @classmethod
    def from_json(cls, call_id: str, document: bytes, key: bytes) -> PendingRollback:
        """Raise ValueError for a document that was not signed with this key."""
        try:
            values = json.loads(document)
            rollback = cls(values["service"], AuditNote(values["actor"], values["reason"]), call_id, values["at"])
            is_signed = hmac.compare_digest(rollback._sign(key), values["signature"])
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no rollback: {error!r}") from error
        if not is_signed:
            raise ValueError("the signature is not by the key of this sidecar")
        return rollback

    def _sign(self, key: bytes) -> str:
        content = [self.call_id, self.service, self.note.actor, self.note.reason, self.called_at]
        return hmac.digest(key, json.dumps(content).encode(), "sha256").hex()


class PendingRollbacks:
    """Wakes `notifier` when a rollback begins or ends. `refresh` reads the settings of a service from Postgres.

    `key` signs rollbacks in Redis. If it is empty, the ledger's key does, once it could be read.
    """

    def __init__(
        self,
        repository: TrafficRepository,
        redis: Redis,
        *,
        refresh: Callable[[str], Awaitable[object]],
        notifier: Notifier,
        initial_shares: InitialShares,
        key: bytes,
    ) -> None:
        self.is_loaded = False  # True after the first attempt to read the rollbacks of other sidecars
        self.redis_error = "not reached yet"  # of the last attempt; empty if it succeeded
        self.rejected_counts = Counter[str]()  # rollbacks in Redis, by reason: forged or replayed
        self._repository = repository
        self._redis = redis
        self._refresh = refresh
        self._notifier = notifier
        self._initial_shares = initial_shares
        self._key = key
        self._pending: dict[str, PendingRollback] = {}
        self._record_tasks: dict[str, asyncio.Task[None]] = {}
        self._recorded: dict[str, float] = {}  # id → when this sidecar got to know that it is recorded
        self._redis_ids: set[str] = set()  # stored in Redis, to be deleted once recorded
        self._forged_ids: set[str] = set()  # stored in Redis
        self._subscription: PubSub | None = None
        self._subscribes_at = inf if is_cluster(redis) else 0.0  # by the monotonic clock

    def get(self, service: str) -> PendingRollback | None:
        """Return the newest pending rollback of the service."""
        return next((item for item in reversed(self._pending.values()) if item.service == service), None)

    def describe_rejected(self) -> str:
        """Return a warning about rollbacks in Redis that no sidecar has stored, empty if there was none."""
        if not self.rejected_counts:
            return ""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected_counts.items()))
        return (
            f"rejected rollbacks that someone stored in Redis ({counts}): check who can write to Redis, and set the same"
            " ABREAST_CONTROL_KEY on all sidecars"
        )

    def list_services(self) -> set[str]:
        return {rollback.service for rollback in self._pending.values()}

    async def add(self, service: str, note: AuditNote) -> str:
        """Put a rollback in force, then try to record it. Return why it is not recorded, empty if it is."""
        rollback = PendingRollback(service, note)
        self._put_in_force(rollback)
        problem = await error_within(self._schedule_record(rollback, is_late=False))
        if not problem or rollback.call_id in self._recorded:
            return ""
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
        await self._prepare()
        try:
            while True:
                await self._load_from_redis()
                self.is_loaded = True
                self._notifier.notify_all()
                for rollback in list(self._pending.values()):
                    self._schedule_record(rollback, is_late=True)
                await self._delete_from_redis()
                await self._wait_for_change()
        finally:
            await self._unsubscribe()

    async def _wait_for_change(self) -> None:
        """Wait until a sidecar stores a rollback, at most for the poll interval. Wait shortly while one is pending."""
        is_settled = not (self._pending or self._redis_ids or self.redis_error)
        if is_settled and time.monotonic() >= self._subscribes_at:
            try:
                with map_redis_errors():
                    if self._subscription is None:
                        self._subscription = self._redis.pubsub()
                        await self._subscription.subscribe(ROLLBACKS_CHANNEL)
                    # The first message confirms the subscription, and the next read finds what came before it.
                    await self._subscription.get_message(timeout=SUBSCRIBED_POLL_INTERVAL_S)
            except RedisError as error:
                log.debug("changes of rollbacks in redis are polled", error=str(error))
                self._subscribes_at = time.monotonic() + SUBSCRIPTION_RETRY_S
            else:
                return
        if self.redis_error or time.monotonic() < self._subscribes_at:
            await self._unsubscribe()
        await asyncio.sleep(ROLLBACK_POLL_INTERVAL_S)

    async def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(RedisError), map_redis_errors():
                await subscription.aclose()  # type: ignore[no-untyped-call]  # of redis-py

    async def _prepare(self) -> None:
        """Read what is needed to verify rollbacks in Redis: the key, and if possible the ids of the recorded ones."""
        while True:
            with contextlib.suppress(LedgerError):
                self._key = self._key or await self._repository.read_control_key()
                await self.refresh_recorded()
            if self._key:
                return
            await asyncio.sleep(KEY_RETRY_DELAY_S)

    async def refresh_recorded(self) -> None:
        """Take over the records of other sidecars."""
        for call_id in await self._repository.list_recorded_rollbacks():
            self._recorded.setdefault(call_id, time.monotonic())

    def _put_in_force(self, rollback: PendingRollback) -> None:
        self._pending[rollback.call_id] = rollback
        self._notifier.notify_all()

    def _schedule_record(self, rollback: PendingRollback, *, is_late: bool) -> asyncio.Task[None]:
        task = self._record_tasks.get(rollback.call_id)
        if task is None or task.done():
            task = self._record_tasks[rollback.call_id] = asyncio.create_task(self._record(rollback, is_late=is_late))
            task.add_done_callback(lambda future: future.cancelled() or future.exception())  # `run` retries
        return task

    async def _record(self, rollback: PendingRollback, *, is_late: bool) -> None:
        note = rollback.late_note if is_late else rollback.note
        # Settings that the ledger has lost are merged first, and the rollback confirms the result.
        await self._refresh(rollback.service)
        try:
            await self._repository.record_rollback(rollback.service, note, rollback.call_id)
        except NotFoundError:
            creation_note = AuditNote("sidecar", "a rollback named this service")
            shares = replace(self._initial_shares[rollback.service], new_share=0)
            await self._repository.ensure(rollback.service, shares, creation_note)
            await self._repository.record_rollback(rollback.service, note, rollback.call_id)
        self._recorded[rollback.call_id] = time.monotonic()
        # Before the rollback ends, so that older settings are never in force again.
        await self._refresh(rollback.service)
        self._pending.pop(rollback.call_id, None)
        self._record_tasks.pop(rollback.call_id, None)
        self._notifier.notify_all()
        if is_late:
            log.info("a pending rollback was recorded", service=rollback.service)

    async def _store_in_redis(self, rollback: PendingRollback) -> bool:
        if not self._key:
            return False
        try:
            await self._call_redis(self._redis.hset(ROLLBACKS_HASH_KEY, rollback.call_id, rollback.to_json(self._key)))
        except RedisError as error:
            log.warning("a rollback is stored in memory only", service=rollback.service, error=str(error))
            return False
        self._redis_ids.add(rollback.call_id)
        with contextlib.suppress(RedisError):  # without this message, other sidecars find it at their next poll
            await self._call_redis(self._redis.publish(ROLLBACKS_CHANNEL, rollback.call_id))
        return True

    async def _load_from_redis(self) -> None:
        """Take over the rollbacks of other sidecars. With Postgres at hand they are only recorded."""
        try:
            documents = await self._call_redis(self._redis.hgetall(ROLLBACKS_HASH_KEY))
        except RedisError as error:
            self.redis_error = str(error)
            return
        self.redis_error = ""
        stored_ids = {call_id.decode(errors="replace"): document for call_id, document in documents.items()}
        self._forged_ids &= stored_ids.keys()
        for call_id in stored_ids.keys() - self._forged_ids - self._pending.keys():
            try:
                rollback = PendingRollback.from_json(call_id, stored_ids[call_id], self._key)
            except ValueError as error:
                self._forged_ids.add(call_id)
                self._count_rejected("forged", call_id, str(error))
                continue
            await self._take_over(rollback)

    async def _take_over(self, rollback: PendingRollback) -> None:
        is_new = rollback.call_id not in self._redis_ids
        self._redis_ids.add(rollback.call_id)
        if recorded_at := self._recorded.get(rollback.call_id):
            if is_new and time.monotonic() - recorded_at > REPLAY_GRACE_S:
                self._count_rejected("replayed", rollback.call_id, "it is recorded and was deleted")
        elif await error_within(self._schedule_record(rollback, is_late=True)):
            self._put_in_force(rollback)

    def _count_rejected(self, reason: str, call_id: str, error: str) -> None:
        self.rejected_counts[reason] += 1
        log.error("a rollback in redis was rejected", call=call_id[:64], reason=reason, error=error)

    async def _delete_from_redis(self) -> None:
        for call_id in self._redis_ids & self._recorded.keys():
            try:
                await self._call_redis(self._redis.hdel(ROLLBACKS_HASH_KEY, call_id))
            except RedisError:
                return
            self._redis_ids.discard(call_id)

    async def _call_redis(self, command: Any) -> Any:
        with map_redis_errors():
            async with asyncio.timeout(OPTIONAL_CALL_TIMEOUT_S):
                return await command
