"""The rights of services in Redis, and what its append-only file keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid4, uuid5

import pytest
import redis
from starlette.responses import PlainTextResponse

from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.capture import Role, Version
from abreast.protocol.join import SERVICES_KEY, Keys, reports_key
from abreast_sidecar.cli import up
from abreast_sidecar.cli.up import StackMonitor
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.ingest.stream import StreamConsumer, StreamEntry
from abreast_sidecar.jobs.retention import expire_incomplete_pairs
from abreast_sidecar.redis_client import connect_redis
from abreast_sidecar.stack.servers import SERVICE_USER, SIDECAR_USER, RedisServer, render_redis_acl
from abreast_sidecar.stack.stack import Stack
from support import eventually_async, find_free_port
from support_middleware import call, captures, http_scope, marks, pair_id

VERSIONS: tuple[tuple[Version, Role], ...] = (("old", "live"), ("new", "shadow"))
PASSWORDS = {SIDECAR_USER: "s" * 32, SERVICE_USER: "w" * 32}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    acl = render_redis_acl(["shop"], *PASSWORDS.values())
    with RedisServer(tmp_path_factory.mktemp("redis"), acl=acl, passwords=PASSWORDS) as started:
        yield started


async def test_service_can_write_to_its_join(server: RedisServer) -> None:
    url = server.url_for(SERVICE_USER)
    middleware = ParallelRunMiddleware(PlainTextResponse("a"), service="shop", redis_url=url, export_interval=0.01)
    pair = pair_id()
    for version, role in VERSIONS:
        await call(middleware, http_scope("/", "GET", marks(pair, version=version, role=role)))
    await middleware.aclose()

    assert len(await captures(server.url)) == 2
    with redis.Redis.from_url(server.url) as admin:
        assert admin.hget(SERVICES_KEY, "shop") == b"1"
        assert admin.hlen(reports_key("shop")) == 1
        assert admin.xlen(Keys("shop", 0).ready) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("HSET", "abreast:rollbacks", "id", "{}"),
        ("PUBLISH", "abreast:rollbacks", "id"),
        ("SUBSCRIBE", "abreast:rollbacks"),
        ("HSET", "abreast:{other/0}:pair:1", "slot", "x"),
        ("HSET", "abreast:{shop2/0}:pair:1", "slot", "x"),
        ("HGETALL", SERVICES_KEY),
        ("HGETALL", "abreast:{other}:reports"),
        ("XADD", Keys("other", 0).ready, "*", "pair", "x"),
        ("EVAL", "return redis.call('hset', KEYS[1], 'a', 'b')", "1", "abreast:rollbacks"),
        ("DEL", SERVICES_KEY),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("CONFIG", "GET", "*"),
        ("CONFIG", "SET", "dir", "x"),
        ("FLUSHALL",),
        ("MONITOR",),
        ("ACL", "LIST"),
        ("SCRIPT", "FLUSH"),
        ("XREADGROUP", "GROUP", "abreast", "x", "STREAMS", Keys("shop", 0).ready, ">"),
        ("SAVE",),
        ("REPLICAOF", "127.0.0.1", "1"),
    ],
)
def test_service_can_do_nothing_else(server: RedisServer, command: tuple[str, ...]) -> None:
    with redis.Redis.from_url(server.url_for(SERVICE_USER)) as client, pytest.raises(redis.ResponseError) as error:
        client.execute_command(*command)

    assert "no permissions" in str(error.value).lower() or "noperm" in str(error.value).lower()


@pytest.mark.parametrize("login", ["", "default:x@", "service:wrong@"])
def test_redis_has_no_access_without_password(server: RedisServer, login: str) -> None:
    url = f"redis://{login}127.0.0.1:{server.port}/0"
    with redis.Redis.from_url(url) as client, pytest.raises((redis.AuthenticationError, redis.ResponseError)):
        client.execute_command("INFO")


def test_acl_file_is_readable_for_its_owner_only(server: RedisServer) -> None:
    assert server.folder is not None
    file = server.folder / "users.acl"

    assert file.stat().st_mode & 0o077 == 0
    assert not any(password in file.read_text() for password in PASSWORDS.values())


async def test_append_only_file_loses_processed_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair with both captures, and one that times out, are in the files until `abreast up` has them rewritten."""
    bodies = [f"body-{uuid4()}".encode() for _ in range(2)]
    acl, keys = render_redis_acl(["shop"], *PASSWORDS.values()), Keys("shop", 0)
    address = SocketAddress("127.0.0.1", find_free_port())
    stack = Stack(EnvoySettings(service="shop", listen=address, old=(address,), new=(address,)))
    with RedisServer(tmp_path, acl=acl, passwords=PASSWORDS) as stack.redis:
        for (version, role), body in zip((VERSIONS[0], *VERSIONS), (bodies[1], *bodies[:1] * 2), strict=True):
            marked = marks(str(uuid5(NAMESPACE_OID, body.decode())), version=version, role=role)
            url = stack.redis.url_for(SERVICE_USER)
            app = ParallelRunMiddleware(PlainTextResponse(body), service="shop", redis_url=url, pair_timeout=0.01)
            await call(app, http_scope("/", "GET", marked))
            await app.aclose()

        async def has_bodies() -> bool:
            return all(body in read_files(tmp_path) for body in bodies)

        await eventually_async(has_bodies, description="the files have both bodies")
        client = connect_redis(stack.redis.url)
        consumer = StreamConsumer(stack.redis.url, name="one", batch_size=10, claim_idle_s=30)
        entries: list[StreamEntry] = []

        async def are_processed() -> bool:
            await expire_incomplete_pairs(client, keys)
            batch = await consumer.read()
            await consumer.acknowledge(batch)
            entries.extend(batch)
            return len(entries) == 2

        await eventually_async(are_processed, description="a worker has processed both pairs")
        monitor = StackMonitor(stack)
        monitor.check()
        assert await has_bodies()  # the hour is not over
        monkeypatch.setattr(up, "REDIS_REWRITE_INTERVAL_S", 0.0)
        monitor.check()

        async def are_rewritten() -> bool:
            info: Any = await client.info("persistence")
            return info["aof_rewrites"] >= 1 and not info["aof_rewrite_in_progress"]

        await eventually_async(are_rewritten, description="Redis has rewritten its files")
        assert await client.xlen(keys.ready) == 0
        assert not [body for body in bodies if body in read_files(tmp_path)]
        await client.aclose()
        await consumer.close()


def read_files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
