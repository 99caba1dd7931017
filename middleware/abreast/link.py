"""The connection to Redis, of one event loop. Every call ends within a stated time and raises LinkError at worst."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import json
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from abreast.errors import AbreastError
from abreast.join import JOIN, SERVICES, Keys, Row, join_arguments, join_command, reports, secret
from abreast.redis_url import connect, disconnect, is_cluster
from abreast.settings import Settings

TIMEOUT = 0.25  # seconds that Redis may take for a reply
CONNECT_TIMEOUT = 1.0  # seconds
JOIN_SHA = hashlib.sha1(JOIN.encode(), usedforsecurity=False).hexdigest()
# Refusals that have to do with the state of Redis and not with what was sent. redis-py has a class for some of them.
PASSING = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM ",
    "READONLY",
    "UNKILLABLE",
)
PASSING_CLASSES = (
    AskError,  # of which MovedError is one
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)


class LinkError(AbreastError):
    """Redis can't be reached or refuses; `passing` when sending the same again later may help."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of the captures of a batch."""

    received: int
    duplicate: int
    late: int
    refused_pairs: int
    refused_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """A command as Redis reads it."""

    text: bytes


def _packed(connection: type[AbstractConnection]) -> type[AbstractConnection]:
    """The kind of connection, but what is written already it sends as it is."""

    class Packed(connection):  # type: ignore[misc, valid-type]
        def pack_command(self, *args: Any) -> list[bytes]:
            last = args[-1]
            return [last.text] if isinstance(last, Written) else super().pack_command(*args)

    return Packed


class Link:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # A batch is sent again by the shipper, which knows the bounds.
        self._client = connect(settings.redis_url, timeout=TIMEOUT, connect_timeout=CONNECT_TIMEOUT)
        self._cluster = is_cluster(self._client)  # where the client must see the keys
        if not self._cluster:
            pool = self._client.connection_pool
            pool.connection_class = _packed(pool.connection_class)

    async def open(self) -> bytes:
        """Make the service known and return the key that secrets are hashed with, the same for all processes."""
        settings = self._settings
        await self._register()
        if settings.redact_key:
            return settings.redact_key.encode()
        key = secret(settings.service)
        await self._call("SET", key, secrets.token_hex(32), "NX")
        shared = await self._call("GET", key)
        if not shared:
            raise LinkError(f"{key} vanished from Redis while it was read", passing=True)
        return shared if isinstance(shared, bytes) else str(shared).encode()

    async def join(self, shard: int, rows: Sequence[Row]) -> Reply:
        """Hand over encoded captures, all of this shard. Sending a batch twice changes nothing."""
        keys, bounds = Keys(self._settings.service, shard), self._settings.bounds
        try:
            if not self._cluster:
                written = Written(join_command(JOIN_SHA, keys, bounds, rows))
                return Reply(*await self._call("EVALSHA", written))
            names, arguments = join_arguments(keys, bounds, rows)
            return Reply(*await self._call("EVALSHA", JOIN_SHA, len(names), *names, *arguments))
        except LinkError as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
            names, arguments = join_arguments(keys, bounds, rows)
            return Reply(*await self._call("EVAL", JOIN, len(names), *names, *arguments))

    async def report(self, process: str, report: dict[str, Any]) -> None:
        """Registers the service too: a Redis that was emptied must not stay without it."""
        await self._register()
        await self._call("HSET", reports(self._settings.service), process, json.encode(report))

    async def _register(self) -> None:
        await self._call("HSET", SERVICES, self._settings.service, self._settings.shards)

    async def close(self) -> None:
        """Close the sockets at once, answered or not."""
        await disconnect(self._client)

    async def _call(self, name: str, *arguments: str | int | bytes | Written) -> Any:
        try:
            return await self._client.execute_command(name, *arguments)  # type: ignore[no-untyped-call]
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise LinkError(f"Redis can't be reached: {error}", passing=True) from error
        except ResponseError as error:
            message = str(error)
            passing = isinstance(error, PASSING_CLASSES) or any(word in message for word in PASSING)
            raise LinkError(f"Redis refuses {name}: {message}", passing=passing) from error
        except (RedisError, OSError) as error:
            raise LinkError(f"Redis can't be used: {error}", passing=True) from error
