"""A read-through cache in Redis for a service whose two versions run side by side.

What a shadow request finds is what users left there. What it loads itself users never see: it keeps nothing, or keeps
it apart. Redis is asked for a fraction of a second at most, and not at all for a while after it did not answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from time import perf_counter_ns
from typing import Any, Literal, Self, TypeVar, cast

import orjson
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from abreast.context import CURRENT, Current
from abreast.effects import record
from abreast.errors import SettingError
from abreast.flight import Flights
from abreast.hops import HIT, MISS, went

T = TypeVar("T")

logger = logging.getLogger("abreast")

PLACES = 20  # questions at a time: more connections answer no sooner
PAUSE = 1.0  # seconds without a question to a Redis that did not answer
TOO_MANY: Any = getattr(exceptions, "MaxConnectionsError", ())  # an older redis-py has none
STAMP = 8  # bytes before a value: when it is over, ms since the epoch, big-endian
OURS = "abreast:"  # what shadows keep begins so, and no namespace does
KIND = "cache"
MISSING = object()

ShadowWrites = Literal["apart", "nowhere"]


class Cache:
    """Values by key, shared by all processes that name the same `namespace`.

    A key is a hash in Redis whose fields are the forms of the value, so that versions which write different forms don't
    take each other's place, and one `delete` removes all. `form` is the release unless it is given: name it, and both
    versions share what they keep, for as long as they agree on what a value looks like.

    `ttl` is in seconds and the longest time a value is kept; each is kept for a little less, by up to `jitter` of it.
    `timeout` is how long Redis may take, in seconds. Values of more than `max_bytes` and None are not kept.
    """

    def __init__(
        self,
        redis: str | Redis,
        *,
        namespace: str,
        form: str | None = None,
        ttl: float = 60.0,
        jitter: float = 0.1,
        timeout: float = 0.2,
        max_bytes: int = 1024 * 1024,
        shadow_writes: ShadowWrites = "nowhere",
    ) -> None:
        _check(namespace, ttl, jitter, timeout, shadow_writes)
        self.redis = _client(redis, timeout) if isinstance(redis, str) else redis
        self.form = os.environ.get("ABREAST_RELEASE", "") if form is None else form
        self._owned = isinstance(redis, str)
        self._namespace = namespace
        self._ttl = ttl
        self._jitter = jitter
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._shadow_writes = shadow_writes
        self._flights = Flights()
        self._places = asyncio.Semaphore(PLACES)
        self._failed = False
        self._again_at = 0.0

    async def get(
        self,
        key: str,
        load: Callable[[], Awaitable[T]],
        *,
        ttl: float | None = None,
        parse: Callable[[Any], T] | None = None,
    ) -> T:
        """The value that is kept under the key, or else what `load` gives, which is kept for next time.

        A value is kept as JSON; `parse` makes it what `load` gives, such as TypeAdapter(Product).validate_python. What
        it refuses is a miss. Those who ask at the same time share one load, and what it raises. Nothing is raised for
        Redis's sake.
        """
        request = CURRENT.get()
        found = await self._find(request, key, parse)
        if found is not MISSING:
            return cast("T", found)
        if not request.shadow:
            return cast("T", await self._flights.run(key, lambda: self._loaded(key, load, ttl)))
        if not self._forgotten(request, key):
            landed = await self._flights.join(key)  # what users wait for, a shadow may read
            if landed is not None and landed.error is None and not landed.given_up:
                return cast("T", landed.value)
        # A load of its own: it may see what this request has written, and nobody else may.
        own = (id(request), key)
        return cast("T", await self._flights.run(own, lambda: self._loaded(key, load, ttl)))

    async def delete(self, *keys: str) -> None:
        """Remove what is kept, in all forms. A shadow doesn't: it only sees them no more itself."""
        request = CURRENT.get()
        for key in keys:
            record("cache.delete", {"namespace": self._namespace, "key": key}, key=key)
        if request.shadow:
            self._forget_for(request, keys)
            names = [self._name(key, request) for key in keys] if self._shadow_writes == "apart" else []
        else:
            for key in keys:
                self._flights.forget(key)
            names = [self._name(key) for key in keys]
        if names:
            await self._ask(lambda: self.redis.delete(*names))

    async def aclose(self) -> None:
        """Close the connections, unless the client was given."""
        if self._owned:
            await self.redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    async def _find(self, request: Current, key: str, parse: Callable[[Any], Any] | None) -> Any:
        since = perf_counter_ns()
        found: Any = MISSING
        if not self._forgotten(request, key):
            found = self._read(await self._ask(lambda: self.redis.hget(self._name(key), self.form)), parse)
        if found is MISSING and request.shadow and self._shadow_writes == "apart":
            name = self._name(key, request)
            found = self._read(await self._ask(lambda: self.redis.hget(name, self.form)), parse)
        went(request, KIND, key.partition(":")[0], since, MISS if found is MISSING else HIT)
        return found

    def _read(self, raw: Any, parse: Callable[[Any], Any] | None) -> Any:
        """MISSING for what is over, or can't be read by this code."""
        if not raw:
            return MISSING
        held = raw.encode("latin-1") if isinstance(raw, str) else bytes(raw)  # a given client may decode
        if int.from_bytes(held[:STAMP], "big") <= time.time() * 1000:
            return MISSING
        try:
            value = orjson.loads(held[STAMP:])
            return value if parse is None else parse(value)
        except Exception as error:  # noqa: BLE001  # whatever the user's code says of another form
            logger.debug("a kept value can't be read, it is loaded again: %s", error)
            return MISSING

    async def _loaded(self, key: str, load: Callable[[], Awaitable[T]], ttl: float | None) -> T:
        flight = self._flights.mark(key)
        value = await load()
        request = CURRENT.get()
        if value is None or (request.shadow and self._shadow_writes == "nowhere"):
            return value
        if not request.shadow and self._flights.mark(key) is not flight:
            return value  # deleted meanwhile: what was loaded may be older
        held = self._written(value)
        if held is not None:
            seconds = (self._ttl if ttl is None else ttl) * random.uniform(1 - self._jitter, 1)  # noqa: S311
            await self._keep(self._name(key, request if request.shadow else None), held, seconds)
        return value

    async def _keep(self, name: str, held: bytes, seconds: float) -> None:
        milliseconds = max(1, math.ceil(seconds * 1000))
        stamp = (int(time.time() * 1000) + milliseconds).to_bytes(STAMP, "big")

        async def keep() -> None:
            async with self.redis.pipeline(transaction=True) as together:
                together.hset(name, self.form, stamp + held)
                together.pexpire(name, milliseconds)
                await together.execute()

        await self._ask(keep)

    def _written(self, value: Any) -> bytes | None:
        """None for what is too long or has no form in JSON."""
        try:
            held = orjson.dumps(value, default=_jsonable)
        except (TypeError, ValueError) as error:
            logger.warning("a value of type %s can't be kept: %s", type(value).__name__, error)
            return None
        return held if len(held) <= self._max_bytes else None

    def _name(self, key: str, shadow: Current | None = None) -> str:
        name = f"{self._namespace}:{key}"
        return name if shadow is None else f"{OURS}shadow:{shadow.version}:{name}"

    async def _ask(self, question: Callable[[], Awaitable[Any]]) -> Any:
        """Redis's answer; None when it has none in time, and while it is left alone."""
        failed = self._failed
        if not self._open():
            return None
        try:
            async with asyncio.timeout(self._timeout):
                await self._places.acquire()
        except (
            TimeoutError,
            RuntimeError,
        ):  # too many ask at once, or in another event loop; Redis may be well
            return None
        try:
            return await self._answer(question) if self._failed == failed else None
        finally:
            self._places.release()

    async def _answer(self, question: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                answer = await question()
        except TOO_MANY:  # of a client that was given
            return None
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            if not self._failed:
                logger.warning("the cache does not answer, values are loaded: %s", str(error) or "too slow")
            self._failed = True
            self._again_at = time.monotonic() + PAUSE
            return None
        if self._failed:
            logger.warning("the cache answers again")
            self._failed = False
        return answer

    def _open(self) -> bool:
        """One question a pause finds out whether Redis is back."""
        if not self._failed:
            return True
        now = time.monotonic()
        if now < self._again_at:
            return False
        self._again_at = now + PAUSE
        return True

    def _forgotten(self, request: Current, key: str) -> bool:
        """Whether this shadow deleted it."""
        return request.shadow and (id(self), key) in request.forgotten

    def _forget_for(self, request: Current, keys: tuple[str, ...]) -> None:
        if not request.forgotten:
            request.forgotten = set()
        request.forgotten |= {(id(self), key) for key in keys}


def _jsonable(value: Any) -> Any:
    """For orjson: what it doesn't know and people keep."""
    if isinstance(value, Decimal):
        return str(value)
    dump = getattr(value, "model_dump", None)  # pydantic's
    if not callable(dump):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return dump(mode="json")


def _client(url: str, timeout: float) -> Redis:
    """No retries: a service without its cache is slower, not down."""
    return Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )


def _check(namespace: str, ttl: float, jitter: float, timeout: float, shadow_writes: str) -> None:
    if not namespace or namespace.startswith(OURS):
        raise SettingError("a cache needs a namespace of its own in Redis, such as namespace='shop'")
    if not (ttl > 0 and timeout > 0 and 0 <= jitter < 1):
        raise SettingError("a cache's ttl and timeout must be seconds above 0, and its jitter below 1")
    if shadow_writes not in {"apart", "nowhere"}:
        raise SettingError(f"shadow_writes must be 'apart' or 'nowhere', got {shadow_writes!r}")
