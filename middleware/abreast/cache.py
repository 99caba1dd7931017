"""A read-through cache in Redis for a service whose two versions run side by side.

A shadow request reads the values that users left. Users never see values that a shadow loads: they are discarded or
isolated. A call to Redis takes a fraction of a second at most. After a failure, calls pause for a second.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from time import perf_counter_ns
from typing import Any, Literal, Self, TypeVar, cast

import orjson
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from abreast.context import CURRENT_CONTEXT, HIT, MISS, RequestContext, add_span
from abreast.effects import record
from abreast.errors import SettingError

T = TypeVar("T")
ShadowWrites = Literal["isolated", "discard"]

logger = logging.getLogger("abreast")

MAX_CONCURRENT_CALLS = 20  # more connections don't get faster replies
PROBE_DELAY_S = 1.0  # seconds between calls to a Redis that is down
MAX_CONNECTIONS_ERROR: Any = getattr(exceptions, "MaxConnectionsError", ())  # an older redis-py has none
EXPIRY_BYTES = 8  # header of a value: its expiry in ms since the epoch, big-endian
RESERVED_PREFIX = "abreast:"  # for the values of shadows; no namespace starts with it
SPAN_KIND = "cache"
NOT_CACHED = object()


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of a load. If it was abandoned, both are None and another caller loads again."""

    value: Any = None
    error: Exception | None = None
    is_abandoned: bool = False


class SingleFlight:
    """Deduplicates concurrent loads in this process.

    The first caller loads in its own task, with its own session and connection. The others wait for it. If the first
    caller is cancelled, one of the others starts its own load. No cancellation reaches another caller.
    """

    def __init__(self) -> None:
        self._loads: dict[Hashable, asyncio.Future[LoadResult]] = {}

    async def join(self, key: Hashable) -> LoadResult | None:
        """Wait for the load in flight and return its result, or return None if no load is in flight."""
        load_future = self._loads.get(self._key_in_loop(key))
        return None if load_future is None else await asyncio.shield(load_future)

    async def run(self, key: Hashable, load: Callable[[], Awaitable[Any]]) -> Any:
        """Return the value, or raise the exception of the load. Concurrent callers share one load."""
        while (result := await self.join(key)) is not None:
            if result.error is not None:
                raise result.error
            if not result.is_abandoned:
                return result.value
        # No `await` since `join` returned None, so this caller loads for all others.
        key = self._key_in_loop(key)
        load_future = self._loads[key] = asyncio.get_running_loop().create_future()
        result = LoadResult(is_abandoned=True)
        try:
            result = LoadResult(await load())
        except Exception as error:
            result = LoadResult(error=error)
            raise
        finally:
            if self._loads.get(key) is load_future:
                del self._loads[key]
            load_future.set_result(result)
        return result.value

    def invalidate(self, key: Hashable) -> None:
        """Detach the load in flight, so that later callers don't get its result."""
        self._loads.pop(self._key_in_loop(key), None)

    def get_version(self, key: Hashable) -> object:
        """Return an object that identifies the load in flight, or None. It changes with `invalidate`."""
        return self._loads.get(self._key_in_loop(key))

    def _key_in_loop(self, key: Hashable) -> Hashable:
        return id(asyncio.get_running_loop()), key


class Cache:
    """Values by key, shared by all processes that name the same `namespace`.

    A key is a hash in Redis with one field per schema version, so that versions with different schemas don't overwrite
    each other, and one `delete` removes all. `schema_version` is the release by default. If both versions of the service
    write the same schema, set it, and they share their values.

    `ttl` is the maximum age of a value in seconds. The actual age is shorter by a random share of up to `jitter`.
    `timeout` is the maximum duration of a call to Redis in seconds. None and values above `max_bytes` are not cached.
    """

    def __init__(
        self,
        redis: str | Redis,
        *,
        namespace: str,
        schema_version: str | None = None,
        ttl: float = 60.0,
        jitter: float = 0.1,
        timeout: float = 0.2,
        max_bytes: int = 1024 * 1024,
        shadow_writes: ShadowWrites = "discard",
    ) -> None:
        if not namespace or namespace.startswith(RESERVED_PREFIX):
            raise SettingError("a cache needs its own namespace in Redis, such as namespace='shop'")
        if not (ttl > 0 and timeout > 0 and 0 <= jitter < 1):
            raise SettingError("a cache's ttl and timeout must be seconds above 0, and its jitter below 1")
        if shadow_writes not in {"isolated", "discard"}:
            raise SettingError(f"shadow_writes must be 'isolated' or 'discard', got {shadow_writes!r}")
        if isinstance(redis, str):  # no retries, so that a failure costs little time
            retry = Retry(NoBackoff(), 0)
            self.redis = Redis.from_url(redis, socket_timeout=timeout, socket_connect_timeout=timeout, retry=retry)
        else:
            self.redis = redis
        self.schema_version = os.environ.get("ABREAST_RELEASE", "") if schema_version is None else schema_version
        self._owns_client = isinstance(redis, str)
        self._namespace = namespace
        self._ttl = ttl
        self._jitter = jitter
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._shadow_writes = shadow_writes
        self._single_flight = SingleFlight()
        self._call_slots = asyncio.Semaphore(MAX_CONCURRENT_CALLS)
        self._is_down = False
        self._probe_at = 0.0

    async def get(
        self,
        key: str,
        load: Callable[[], Awaitable[T]],
        *,
        ttl: float | None = None,
        parse: Callable[[Any], T] | None = None,
    ) -> T:
        """Return the cached value, or load and cache it.

        A value is cached as JSON. `parse` converts it to the type that `load` returns, for example with
        TypeAdapter(Product).validate_python. If `parse` raises, the call is a miss. Concurrent callers share one load
        and its exception. Errors of Redis are never raised.
        """
        context = CURRENT_CONTEXT.get()
        value = await self._look_up(context, key, parse)
        if value is not NOT_CACHED:
            return cast("T", value)
        if not context.is_shadow:
            return cast("T", await self._single_flight.run(key, lambda: self._load_and_store(key, load, ttl)))
        if not self._is_deleted(context, key):
            result = await self._single_flight.join(key)  # a shadow may share the load of a user
            if result is not None and result.error is None and not result.is_abandoned:
                return cast("T", result.value)
        # A separate load, because it may see uncommitted writes of this request.
        shadow_key = (id(context), key)
        return cast("T", await self._single_flight.run(shadow_key, lambda: self._load_and_store(key, load, ttl)))

    async def delete(self, *keys: str) -> None:
        """Delete values, in all schema versions. A shadow only hides them from itself."""
        context = CURRENT_CONTEXT.get()
        for key in keys:
            record("cache.delete", {"namespace": self._namespace, "key": key}, key=key)
        if context.is_shadow:
            if not context.deleted_cache_keys:
                context.deleted_cache_keys = set()
            context.deleted_cache_keys |= {(id(self), key) for key in keys}
            redis_keys = [self._redis_key(key, context) for key in keys] if self._shadow_writes == "isolated" else []
        else:
            for key in keys:
                self._single_flight.invalidate(key)
            redis_keys = [self._redis_key(key) for key in keys]
        if redis_keys:
            await self._call_redis(lambda: self.redis.delete(*redis_keys))

    async def aclose(self) -> None:
        """Close the connections, unless the caller passed a client."""
        if self._owns_client:
            await self.redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    async def _look_up(self, context: RequestContext, key: str, parse: Callable[[Any], Any] | None) -> Any:
        started_ns = perf_counter_ns()
        redis_keys = [] if self._is_deleted(context, key) else [self._redis_key(key)]
        if context.is_shadow and self._shadow_writes == "isolated":
            redis_keys.append(self._redis_key(key, context))
        value: Any = NOT_CACHED
        for redis_key in redis_keys:
            value = self._decode(
                await self._call_redis(partial(self.redis.hget, redis_key, self.schema_version)), parse
            )
            if value is not NOT_CACHED:
                break
        add_span(context, SPAN_KIND, key.partition(":")[0], started_ns, MISS if value is NOT_CACHED else HIT)
        return value

    def _decode(self, raw: Any, parse: Callable[[Any], Any] | None) -> Any:
        """Return NOT_CACHED if the value is expired, or this code can't parse it."""
        if not raw:
            return NOT_CACHED
        content = raw.encode("latin-1") if isinstance(raw, str) else bytes(raw)  # a client with decode_responses
        if int.from_bytes(content[:EXPIRY_BYTES], "big") <= time.time() * 1000:
            return NOT_CACHED
        try:
            value = orjson.loads(content[EXPIRY_BYTES:])
            return value if parse is None else parse(value)
        except Exception as error:  # noqa: BLE001  # raised by the code of the service for another schema
            logger.debug("a cached value can't be parsed and is loaded again: %s", error)
            return NOT_CACHED

    async def _load_and_store(self, key: str, load: Callable[[], Awaitable[T]], ttl: float | None) -> T:
        version = self._single_flight.get_version(key)
        value = await load()
        context = CURRENT_CONTEXT.get()
        if value is None or (context.is_shadow and self._shadow_writes == "discard"):
            return value
        if not context.is_shadow and self._single_flight.get_version(key) is not version:
            return value  # deleted meanwhile, so the loaded value may be stale
        try:
            content = orjson.dumps(value, default=_to_jsonable)
        except (TypeError, ValueError) as error:
            logger.warning("a value of type %s can't be cached: %s", type(value).__name__, error)
            return value
        if len(content) <= self._max_bytes:
            seconds = (self._ttl if ttl is None else ttl) * random.uniform(1 - self._jitter, 1)  # noqa: S311
            await self._store(self._redis_key(key, context if context.is_shadow else None), content, seconds)
        return value

    async def _store(self, redis_key: str, content: bytes, seconds: float) -> None:
        milliseconds = max(1, math.ceil(seconds * 1000))
        expiry = (int(time.time() * 1000) + milliseconds).to_bytes(EXPIRY_BYTES, "big")

        async def store() -> None:
            async with self.redis.pipeline(transaction=True) as pipeline:
                pipeline.hset(redis_key, self.schema_version, expiry + content)
                pipeline.pexpire(redis_key, milliseconds)
                await pipeline.execute()

        await self._call_redis(store)

    def _redis_key(self, key: str, shadow: RequestContext | None = None) -> str:
        name = f"{self._namespace}:{key}"
        return name if shadow is None else f"{RESERVED_PREFIX}shadow:{shadow.version}:{name}"

    async def _call_redis(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Return the reply of Redis, or None if it is down or too slow."""
        was_down = self._is_down
        if was_down:
            now = time.monotonic()
            if now < self._probe_at:
                return None
            self._probe_at = now + PROBE_DELAY_S
        try:
            async with asyncio.timeout(self._timeout):
                await self._call_slots.acquire()
        except (TimeoutError, RuntimeError):  # too many calls, or another event loop; Redis may be up
            return None
        try:
            if self._is_down != was_down:
                return None
            async with asyncio.timeout(self._timeout):
                reply = await command()
        except MAX_CONNECTIONS_ERROR:  # a client that the caller passed
            return None
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            if not self._is_down:
                logger.warning("the cache is unavailable; loading values from the source: %s", str(error) or "timeout")
            self._is_down = True
            self._probe_at = time.monotonic() + PROBE_DELAY_S
            return None
        finally:
            self._call_slots.release()
        if self._is_down:
            logger.warning("the cache is up again")
            self._is_down = False
        return reply

    def _is_deleted(self, context: RequestContext, key: str) -> bool:
        return context.is_shadow and (id(self), key) in context.deleted_cache_keys


def _to_jsonable(value: Any) -> Any:
    """Convert types that orjson does not know."""
    if isinstance(value, Decimal):
        return str(value)
    dump = getattr(value, "model_dump", None)  # pydantic
    if not callable(dump):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return dump(mode="json")
