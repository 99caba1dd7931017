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

import redis.asyncio
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
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
    options = {"socket_timeout": timeout, "socket_connect_timeout": connect_timeout, "retry": Retry(NoBackoff(), 0)}
    client = _make_client(url, redis.asyncio, ClusterClient, options, redis_class=SentinelClient)
    return cast("Redis", client)


def connect_sync(url: str, *, timeout: float) -> Any:
    """Return a client for programs without an event loop. It decodes replies to text."""
    retry = redis.retry.Retry(NoBackoff(), 0)
    options = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": retry, "decode_responses": True}
    return _make_client(url, redis, redis.RedisCluster, options, redis_class=redis.Redis)


def _make_client(url: str, library: Any, cluster_class: Any, options: dict[str, Any], *, redis_class: Any) -> Any:
    """Make a client of `redis` or of `redis.asyncio`. `redis_class` is for the primary of Sentinels."""
    address = parse_address(url)
    if address.kind == "server":
        return library.Redis.from_url(url.strip(), **options)
    options |= _client_options(address)
    if address.kind == "cluster":
        return cluster_class(startup_nodes=[library.cluster.ClusterNode(*node) for node in address.nodes], **options)
    # Sentinels have no databases, and separate users.
    sentinel_options = {**options, "db": 0, "username": None, "password": None, **address.sentinel_credentials}
    sentinels = library.sentinel.Sentinel(list(address.nodes), sentinel_kwargs=sentinel_options, **options)
    return sentinels.master_for(address.name, redis_class=redis_class)


def _client_options(address: Address) -> dict[str, Any]:
    """Return the options in a URL, without host and port."""
    options: dict[str, Any] = dict(parse_url(address.server))
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    for name in ("host", "port", *(["db"] if address.kind == "cluster" else [])):
        options.pop(name, None)
    return options


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
