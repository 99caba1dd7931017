"""The rights of services in Redis, and what its append-only file keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from starlette.responses import PlainTextResponse

from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.capture import Role, Version
from abreast.protocol.join import SERVICES_KEY, Keys, reports_key
from abreast_sidecar.stack.servers import SERVICE_USER, SIDECAR_USER, RedisServer, render_redis_acl
from support import eventually
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


def test_append_only_file_loses_processed_captures(tmp_path: Path) -> None:
    marker = b"body-of-a-user"
    with RedisServer(tmp_path, acl=render_redis_acl(["shop"], *PASSWORDS.values()), passwords=PASSWORDS) as server:
        client = redis.Redis.from_url(server.url)
        client.xadd("abreast:{shop/0}:ready", {"pair": "1", "capture": marker})
        eventually(lambda: count_markers(tmp_path, marker) == 1, description="the capture is in the file")
        client.xtrim("abreast:{shop/0}:ready", maxlen=0)
        client.bgrewriteaof()  # as `abreast up` does every hour

        eventually(lambda: count_markers(tmp_path, marker) == 0, description="the append-only file is rewritten")
        client.close()


def count_markers(folder: Path, marker: bytes) -> int:
    return sum(file.read_bytes().count(marker) for file in folder.rglob("*.aof"))
