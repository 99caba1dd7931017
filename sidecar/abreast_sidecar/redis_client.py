"""Connections to Redis, Lua scripts, and the shards of all services."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import redis
import structlog
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.connection import HiredisRespSerializer

from abreast.protocol import redis_client as protocol_client
from abreast.protocol.join import SERVICES_KEY, Keys
from abreast_sidecar.errors import RedisError

READ_BLOCK_MS = 1000  # a read waits so long for entries
REDIS_SOCKET_TIMEOUT_S = 5.0  # above READ_BLOCK_MS, so that a read without entries is no timeout
REDIS_CONNECT_TIMEOUT_S = 2.0
MAX_SHARDS = 1024  # per service, in case the hash of services is invalid

log = structlog.get_logger(__name__)


def connect_redis(url: str) -> Redis:
    """Return a client that connects at the first call. It retries nothing: callers know what is safe to retry."""
    client = protocol_client.connect(url, timeout=REDIS_SOCKET_TIMEOUT_S, connect_timeout=REDIS_CONNECT_TIMEOUT_S)
    if not protocol_client.is_cluster(client):
        pool = client.connection_pool
        pool.connection_class = _use_hiredis_packer(pool.connection_class)
    return client


def _use_hiredis_packer(connection: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return the connection class with hiredis's serializer, which redis-py's blocking client uses too.

    It acknowledges a batch in a fifth of the time.
    """

    class HiredisConnection(connection):  # type: ignore[misc, valid-type]
        _packer = HiredisRespSerializer()

        def pack_command(self, *args: Any) -> list[bytes]:
            return self._packer.pack(*args)  # type: ignore[no-any-return]

    return HiredisConnection


@dataclass(frozen=True, slots=True)
class LuaScript:
    """A Lua script. All keys of one call must be of one shard, so that one node of a cluster has them."""

    text: str
    sha: str

    async def run(self, client: Redis, keys: Sequence[str], arguments: Sequence[str | int | float | bytes]) -> Any:
        """Run the script by its digest, or send its text if Redis does not have it."""
        try:
            return await client.evalsha(self.sha, len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *arguments)


def load_script(name: str) -> LuaScript:
    text = (resources.files("abreast_sidecar") / "lua" / f"{name}.lua").read_text()
    return LuaScript(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@contextmanager
def map_redis_errors() -> Iterator[None]:
    """Turn errors of the driver into RedisError."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RedisError(f"redis can't be used, check ABREAST_REDIS_URL and the server: {message}") from error


async def list_shards(client: Redis) -> list[Keys]:
    """List the shards that services use, and former shards that still have a stream."""
    shard_keys: list[Keys] = []
    shard_counts: dict[bytes, bytes] = await client.hgetall(SERVICES_KEY)  # type: ignore[assignment]  # responses are not decoded
    for raw, count in sorted(shard_counts.items()):
        service = raw.decode(errors="replace")
        try:
            number = min(int(count), MAX_SHARDS)
            shard_keys += [Keys(service, shard) for shard in range(number)]
        except ValueError as error:
            log.debug("a service in redis has an invalid shard count", service=service, reason=str(error))
            continue
        shard = number
        while shard < MAX_SHARDS and await client.exists(Keys(service, shard).ready):
            shard_keys.append(Keys(service, shard))
            shard += 1
    return shard_keys
