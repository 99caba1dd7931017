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

from abreast.protocol import redis_client as redis_url
from abreast.protocol.join import SERVICES_KEY, Keys
from abreast_sidecar.errors import RedisError

READ_BLOCK_MS = 1000  # ms that a read waits for entries


REDIS_SOCKET_TIMEOUT_S = 5.0  # seconds; above BLOCK, or each quiet second would look like a failure


REDIS_CONNECT_TIMEOUT_S = 2.0  # seconds


def connect_redis(url: str) -> Redis:
    """Opens nothing yet. Nothing is tried again by the client: the callers know what may be."""
    client = redis_url.connect(url, timeout=REDIS_SOCKET_TIMEOUT_S, connect_timeout=REDIS_CONNECT_TIMEOUT_S)
    if not redis_url.is_cluster(client):
        pool = client.connection_pool
        pool.connection_class = _use_hiredis_packer(pool.connection_class)
    return client


def _use_hiredis_packer(connection: type[AbstractConnection]) -> type[AbstractConnection]:
    """The kind of connection, but its commands are written by hiredis, as redis-py's blocking client has it: to
    acknowledge a batch takes a fifth of the time.
    """

    class HiredisConnection(connection):  # type: ignore[misc, valid-type]
        _packer = HiredisRespSerializer()

        def pack_command(self, *args: Any) -> list[bytes]:
            return self._packer.pack(*args)  # type: ignore[no-any-return]

    return HiredisConnection


@dataclass(frozen=True, slots=True)
class LuaScript:
    """All keys of a call are of one shard, so that it runs on any node of a cluster that has them."""

    text: str
    sha: str

    async def run(self, client: Redis, keys: Sequence[str], arguments: Sequence[str | int | float | bytes]) -> Any:
        """By its digest; in full where Redis does not know it, or has forgotten."""
        try:
            return await client.evalsha(self.sha, len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *arguments)


def load_script(name: str) -> LuaScript:
    text = (resources.files("abreast_sidecar") / "lua" / f"{name}.lua").read_text()
    return LuaScript(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@contextmanager
def map_redis_errors() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RedisError(f"redis can't be used, check ABREAST_REDIS_URL and the server: {message}") from error


log = structlog.get_logger(__name__)

MAX_SHARDS = 1024  # of a service: a bound against nonsense in the hash


async def list_shards(client: Redis) -> list[Keys]:
    """All shards that services have named, and those of before that still have a stream."""
    shard_keys: list[Keys] = []
    shard_counts: dict[bytes, bytes] = await client.hgetall(SERVICES_KEY)  # type: ignore[assignment]  # responses are not decoded
    for raw, count in sorted(shard_counts.items()):
        service = raw.decode(errors="replace")
        try:
            number = min(int(count), MAX_SHARDS)
            shard_keys += [Keys(service, shard) for shard in range(number)]
        except ValueError as error:
            log.debug("a service in redis is skipped", service=service, reason=str(error))
            continue
        shard = number
        while shard < MAX_SHARDS and await client.exists(Keys(service, shard).ready):
            shard_keys.append(Keys(service, shard))
            shard += 1
    return shard_keys
