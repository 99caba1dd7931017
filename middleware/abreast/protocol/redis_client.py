"""Redis clients by URL: for one server, for a cluster, or for the primary of a group of Sentinels.

    redis://user:password@host:6379/0                                rediss:// with TLS, unix:// for a socket
    redis+cluster://user:password@host:7000,host2:7000               rediss+cluster://
    redis+sentinel://user:password@host:26379,host2:26379/name/0     rediss+sentinel://

User and password are the ones of the servers. Sentinels have `?sentinel_username=…&sentinel_password=…`. redis-py
defines further options, such as `ssl_ca_certs`. One address is enough to find the other nodes or Sentinels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError

Kind = Literal["server", "cluster", "sentinel"]
KIND_BY_SUFFIX: Mapping[str, Kind] = {"": "server", "cluster": "cluster", "sentinel": "sentinel"}
DEFAULT_PORTS = {"cluster": 6379, "sentinel": 26379}
SENTINEL_OPTION_PREFIX = "sentinel_"
URL_FORMATS = (
    "a URL such as redis://127.0.0.1:6379/0, rediss://…, unix://…, redis+cluster://host:7000,host2:7000 "
    "or redis+sentinel://host:26379,host2:26379/name/0"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL. `server` is a URL for redis-py: of the single server, or of the first of `nodes`."""

    kind: Kind
    server: str = field(repr=False)  # may hold a password
    nodes: tuple[tuple[str, int], ...] = ()
    name: str = ""  # name of the primary in the Sentinels
    sentinel_credentials: Mapping[str, str] = field(default_factory=dict, repr=False)  # username and password


def parse_address(url: str) -> Address:
    """Parse a URL. Raises ValueError with the accepted formats."""
    scheme, _, location = url.strip().partition("://")
    base, _, kind = scheme.partition("+")
    if kind and (base not in {"redis", "rediss"} or kind not in DEFAULT_PORTS):
        raise ValueError(URL_FORMATS)
    try:
        if kind:
            return _parse_multi_node(base, kind, location)
        parse_url(url.strip())
        return Address("server", url.strip())
    except ValueError:
        raise ValueError(URL_FORMATS) from None


def _parse_multi_node(base: str, kind: str, location: str) -> Address:
    parts = urlsplit(f"//{location}")
    credentials, at, hosts = parts.netloc.rpartition("@")
    nodes = tuple(_parse_node(host, DEFAULT_PORTS[kind]) for host in hosts.split(",") if host)
    path = [unquote(part) for part in parts.path.split("/") if part]
    name, database = ("", path) if kind == "cluster" else (path[0] if path else "", path[1:])
    number = database[0] if database else "0"
    if not nodes or len(database) > 1 or not number.isdigit():
        raise ValueError(location)
    if (kind == "sentinel") != bool(name) or (kind == "cluster" and number != "0"):
        raise ValueError(location)
    query = dict(parse_qsl(parts.query))
    sentinel = {
        key.removeprefix(SENTINEL_OPTION_PREFIX): query.pop(key)
        for key in list(query)
        if key.startswith(SENTINEL_OPTION_PREFIX)
    }
    host, port = nodes[0]
    host_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    server = f"{base}://{credentials}{at}{host_port}/{number}" + (f"?{urlencode(query)}" if query else "")
    parse_url(server)
    return Address(KIND_BY_SUFFIX[kind], server, nodes, name, sentinel)


def _parse_node(host_port: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{host_port}")
    if not parts.hostname:
        raise ValueError(host_port)
    return parts.hostname, parts.port or default_port


class ClusterClient(RedisCluster):
    """A cluster client that reloads the topology after a failure. Retries are left to the callers."""

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().execute_command(*args, **kwargs)
        except (RedisConnectionError, OSError):
            await self.aclose()
            raise
        except RedisClusterException as error:  # no subclass of RedisError
            await self.aclose()
            raise RedisConnectionError(str(error)) from error
        except RedisError as error:
            if str(error).startswith(("CLUSTERDOWN", "MASTERDOWN", "Command ")):
                await self.aclose()
            raise


class SentinelClient(Redis):
    """A client for the primary. To close it also closes the connections to the Sentinels."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self.disconnect_sentinels()

    async def disconnect_sentinels(self) -> None:
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.connection_pool.disconnect(inuse_connections=True)


def connect(url: str, *, timeout: float, connect_timeout: float) -> Redis:
    """Return a client that connects on first use and does not retry. Timeouts are in seconds."""
    address = parse_address(url)
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": connect_timeout,
        "retry": Retry(NoBackoff(), 0),
    }
    if address.kind == "server":
        return Redis.from_url(url.strip(), **options)
    options |= _client_options(address)
    if address.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.nodes]
        return cast("Redis", ClusterClient(startup_nodes=nodes, **options))
    sentinels = Sentinel(list(address.nodes), sentinel_kwargs=_sentinel_options(address, options), **options)  # type: ignore[no-untyped-call]  # redis-py's
    return cast("Redis", sentinels.master_for(address.name, redis_class=SentinelClient))


def _client_options(address: Address) -> dict[str, Any]:
    """Return the options in a URL, without host and port."""
    options: dict[str, Any] = dict(parse_url(address.server))
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    for name in ("host", "port", *(["db"] if address.kind == "cluster" else [])):
        options.pop(name, None)
    return options


def _sentinel_options(address: Address, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the Sentinels, which have no databases, and separate users."""
    return {**options, "db": 0, "username": None, "password": None, **address.sentinel_credentials}


def connect_sync(url: str, *, timeout: float) -> Any:
    """Return a client for programs without an event loop. It decodes replies to text."""
    import redis

    address = parse_address(url)
    retry = redis.retry.Retry(NoBackoff(), 0)
    options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": retry}
    options["decode_responses"] = True
    if address.kind == "server":
        return redis.Redis.from_url(url.strip(), **options)
    options |= _client_options(address)
    if address.kind == "cluster":
        nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.nodes]  # type: ignore[no-untyped-call]  # redis-py's
        return redis.RedisCluster(startup_nodes=nodes, **options)
    sentinels = redis.sentinel.Sentinel(
        list(address.nodes), sentinel_kwargs=_sentinel_options(address, options), **options
    )  # type: ignore[no-untyped-call]  # redis-py's
    return sentinels.master_for(address.name)  # type: ignore[no-untyped-call]  # redis-py's


async def disconnect(client: Redis) -> None:
    """Close the sockets at once, even if replies are outstanding. The client remains usable."""
    if isinstance(client, RedisCluster):
        await client.aclose()
    else:
        await client.connection_pool.disconnect(inuse_connections=True)
    if isinstance(client, SentinelClient):
        await client.disconnect_sentinels()


def is_cluster(client: Redis) -> bool:
    return isinstance(client, RedisCluster)
