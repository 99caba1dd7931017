"""Connections to Redis, Lua scripts, and the shards of all services."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
from abreast.protocol.join import SERVICES_KEY, Keys, reports_key
from abreast_sidecar.errors import RedisError, first_line

READ_BLOCK_MS = 2000  # a read waits so long for entries
REDIS_SOCKET_TIMEOUT_S = 5.0  # above READ_BLOCK_MS, so that a read without entries is no timeout
REDIS_CONNECT_TIMEOUT_S = 2.0
MAX_ENTRY_AGE_S = 30.0  # an entry that stays longer in its stream can't be written, or no worker reads it
DELAY_CHECK_TIMEOUT_S = 1.0
MAX_SHARDS = 1024  # of all services
MAX_SERVICES = 500  # with data in Redis; further ones are ignored, and their captures wait there
MAX_UNCHECKED_SHARDS = 100  # with more, only services with data count: each process can register any name
MAX_CHECKED_SHARDS = 16  # of a service without reports, for pairs that wait
PIPELINE_SERVICES, PIPELINE_COMMANDS = 500, 2000

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
        raise RedisError(f"redis can't be used, check ABREAST_REDIS_URL and the server: {first_line(error)}") from error


class ShardList(list[Keys]):
    """The shards that sidecars read, and the number of services with data that they ignore."""

    ignored_services = 0


async def list_shards(client: Redis, *, include_former: bool = True) -> ShardList:
    """List the shards that services use, and former shards that still have a stream.

    Each process can register any name. If there are many, delete those without data. A running service registers again.
    """
    registered: dict[bytes, bytes] = await client.hgetall(SERVICES_KEY)  # type: ignore[assignment]  # responses are not decoded
    shard_counts, ignored_services = _read_shard_counts(registered), 0
    if max(len(registered), sum(shard_counts.values())) > MAX_UNCHECKED_SHARDS:
        active = await _find_active_services(client, shard_counts)
        inactive = [name for name in registered if name.decode(errors="replace") not in active]
        for start in range(0, len(inactive), PIPELINE_SERVICES):
            await client.hdel(SERVICES_KEY, *inactive[start : start + PIPELINE_SERVICES])
        if inactive:
            log.warning("registrations of services without data are deleted from redis", services=len(inactive))
        ignored_services = max(0, len(active) - MAX_SERVICES)
        shard_counts = {service: shard_counts[service] for service in sorted(active)[:MAX_SERVICES]}
        if len(active) > MAX_SERVICES or sum(shard_counts.values()) > MAX_SHARDS:
            log.error("too many services send captures; those above the limit are ignored", services=len(active))
    shard_keys: list[Keys] = []
    for service, count in shard_counts.items():
        shard_keys += [Keys(service, shard) for shard in range(count)]
        shard = count
        while include_former and shard < MAX_SHARDS and await client.exists(Keys(service, shard).ready):
            shard_keys.append(Keys(service, shard))
            shard += 1
    # One service can't take the places of others.
    shards = ShardList(sorted(shard_keys, key=lambda keys: keys.shard)[:MAX_SHARDS])
    shards.ignored_services = ignored_services
    return shards


def _read_shard_counts(registered: Mapping[bytes, bytes]) -> dict[str, int]:
    shard_counts: dict[str, int] = {}
    for name, count in sorted(registered.items()):
        service = name.decode(errors="replace")
        try:
            Keys(service, 0)
            shard_counts[service] = min(int(count), MAX_SHARDS)
        except ValueError as error:
            log.debug("a service in redis has an invalid shard count", service=service, reason=str(error))
    return shard_counts


async def _find_active_services(client: Redis, shard_counts: Mapping[str, int]) -> set[str]:
    """Return the services whose processes report, or whose pairs wait."""
    commands = [
        (service, command, name)
        for service, count in shard_counts.items()
        for command, name in (
            ("EXISTS", reports_key(service)),
            *(("XLEN", Keys(service, shard).ready) for shard in range(min(count, MAX_CHECKED_SHARDS))),
            *(("ZCARD", Keys(service, shard).due) for shard in range(min(count, MAX_CHECKED_SHARDS))),
        )
    ]
    active: set[str] = set()
    for start in range(0, len(commands), PIPELINE_COMMANDS):
        batch = commands[start : start + PIPELINE_COMMANDS]
        pipeline = client.pipeline(transaction=False)
        for _, command, name in batch:
            pipeline.execute_command(command, name)
        sizes = await pipeline.execute()
        active |= {service for (service, _, _), size in zip(batch, sizes, strict=True) if size}
    return active


OLDEST_ENTRY_SCRIPT = load_script("oldest_entry")


class PairBacklog:
    """The pairs that wait in Redis."""

    def __init__(self, client: Redis) -> None:
        self.client = client

    async def count(self, service: str) -> int | None:
        """Count pairs that wait for a copy or for a worker. Return None while Redis can't be reached."""
        pairs = 0
        try:
            for keys in await list_shards(self.client):
                if keys.service == service:
                    pairs += await self.client.zcard(keys.due) + await self.client.xlen(keys.ready)
        except (redis.RedisError, OSError) as error:
            log.warning("can't count the pairs that wait in redis", error=str(error))
            return None
        return pairs

    async def describe_delay(self, service: str = "") -> str:
        """Return why the ledger lags behind Redis, empty if it does not. Check all services if no name is given.

        The text is empty while Redis can't be reached: that is another problem.
        """
        try:
            async with asyncio.timeout(DELAY_CHECK_TIMEOUT_S):
                for keys in await list_shards(self.client):
                    if service in ("", keys.service):
                        age_ms = await OLDEST_ENTRY_SCRIPT.run(self.client, [keys.ready], [])
                        if age_ms > MAX_ENTRY_AGE_S * 1000:
                            return (
                                f"a pair of {keys.service} has waited for more than {MAX_ENTRY_AGE_S:g} s to be written"
                                " to the ledger; see the log of the workers"
                            )
        except (redis.RedisError, OSError, TimeoutError) as error:
            log.debug("can't check the age of the pairs that wait in redis", error=str(error))
        return ""
