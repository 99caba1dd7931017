"""Outages of Redis: answers stay unchanged, the queue stays bounded, drops are counted, and the exporter recovers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import orjson
import pytest
import redis
import redis.asyncio
from click.testing import CliRunner

from abreast.export.redaction import Redactor
from abreast.export.serializer import RotatingRedactor
from abreast.export.transport import JoinResult, RedisTransport
from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.capture import Role, Version
from abreast.protocol.join import SERVICES_KEY, Keys, reports_key
from abreast.recorder import Message, Receive, Scope, Send
from abreast.settings import SettingsKwargs
from abreast_sidecar.cli import abreast
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.stack.servers import RedisServer
from support import eventually_async, find_free_port
from support_middleware import call, captures, http_scope, marks, pair_id, sampled

pytestmark = pytest.mark.redis

QUEUE = 50
KEYS = Keys("shop", 0)
VERSIONS: tuple[tuple[Version, Role], ...] = (("old", "live"), ("new", "shadow"))
JSON_HEADER = (b"content-type", b"application/json")


async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"answer"})


@contextmanager
def server(*options: str, port: int = 0) -> Iterator[RedisServer]:
    """Start a Redis that the test may stop, fill or freeze."""
    binary = os.environ.get("ABREAST_TEST_REDIS")
    with RedisServer(binary=Path(binary) if binary else None, options=options, port=port) as started:
        yield started


def middleware(url: str, **settings: Unpack[SettingsKwargs]) -> ParallelRunMiddleware:
    options: SettingsKwargs = {"service": "shop", "redis_url": url, "queue_count": QUEUE, **settings}
    return ParallelRunMiddleware(app, **options)


async def ask(target: ParallelRunMiddleware, count: int) -> float:
    """Return the seconds of the slowest request. Every answer must be the one of the app."""
    slowest = 0.0
    for _ in range(count):
        start = time.perf_counter()
        messages, error = await call(target, sampled())
        slowest = max(slowest, time.perf_counter() - start)

        assert error is None
        assert [message.get("body") for message in messages] == [None, b"answer"]
    return slowest


def balanced(target: ParallelRunMiddleware, request_count: int) -> bool:
    queue = target.queue
    return queue.captured_count == request_count == sum(queue.version_counts.values()) + len(queue.recorders)


async def shipped(target: ParallelRunMiddleware, count: int) -> None:
    async def enough() -> bool:
        return target.queue.shipped_count >= count

    await eventually_async(enough, description=f"{count} captures are shipped")


async def failing(log: pytest.LogCaptureFixture) -> None:
    async def has_logged() -> bool:
        return "they stay queued" in log.text

    await eventually_async(has_logged, description="the log says that captures wait")


async def test_redis_down_leaves_answers_unchanged_and_counts_drops(caplog: pytest.LogCaptureFixture) -> None:
    target = middleware(f"redis://127.0.0.1:{find_free_port()}/0", flush_timeout=0.3)
    slowest = await ask(target, 3 * QUEUE)
    await failing(caplog)
    start = time.monotonic()
    await target.aclose()

    assert time.monotonic() - start < 2
    assert slowest < 0.2
    assert target.queue.drop_counts == {"queue_count": 2 * QUEUE, "shutdown": QUEUE}
    assert balanced(target, 3 * QUEUE)


async def test_waiting_captures_are_sent_once_redis_is_up(caplog: pytest.LogCaptureFixture) -> None:
    port = find_free_port()
    target = middleware(f"redis://127.0.0.1:{port}/0")
    await ask(target, QUEUE + 10)
    await failing(caplog)
    with server(port=port) as started:
        await shipped(target, QUEUE)
        await ask(target, 5)
        await shipped(target, QUEUE + 5)
        await target.aclose()

        assert len(await captures(started.url)) == QUEUE + 5
    assert target.queue.drop_counts == {"queue_count": 10}
    assert caplog.text.count("they stay queued") == 1
    assert caplog.text.count("captures go to Redis again") == 1


async def test_frozen_redis_delays_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with server() as started:
        target = middleware(started.url)
        await ask(target, 1)
        await shipped(target, 1)
        assert started.process is not None
        os.kill(started.process.pid, signal.SIGSTOP)
        slowest = await ask(target, QUEUE + 20)
        await failing(caplog)
        queued_count = target.queue.count
        os.kill(started.process.pid, signal.SIGCONT)
        await shipped(target, QUEUE + 1)
        await target.aclose()

        assert len(await captures(started.url)) == target.queue.shipped_count
    assert slowest < 0.2
    assert queued_count <= QUEUE
    assert balanced(target, QUEUE + 21)


async def test_frozen_redis_does_not_delay_the_shutdown() -> None:
    with server() as started:
        target = middleware(started.url, flush_timeout=0.5)
        await ask(target, 1)
        await shipped(target, 1)
        assert started.process is not None
        os.kill(started.process.pid, signal.SIGSTOP)
        await ask(target, 5)
        start = time.monotonic()
        await target.aclose()
        duration = time.monotonic() - start
        os.kill(started.process.pid, signal.SIGCONT)

    assert duration < 1.5
    assert target.queue.drop_counts == {"shutdown": 5}


async def test_slow_redis_does_not_delay_the_shutdown(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reply is in time, but the queue is too long for flush_timeout."""
    target = middleware(redis_url, flush_timeout=0.3, export_batch=1)
    slow = RedisTransport.join

    async def late(self: RedisTransport, shard: int, batch: Any) -> JoinResult:
        await asyncio.sleep(0.1)
        return await slow(self, shard, batch)

    monkeypatch.setattr(RedisTransport, "join", late)
    await ask(target, 50)
    start = time.monotonic()
    await target.aclose()

    assert time.monotonic() - start < 2
    assert target.queue.drop_counts["shutdown"] > 0
    assert target.queue.count == 0


async def test_emptied_redis_gets_the_service_again(redis_url: str) -> None:
    target = middleware(redis_url)
    await ask(target, 1)
    await shipped(target, 1)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        await ask(target, 1)
        await eventually_async(registered(client), description="the service is registered")
    await target.aclose()


def registered(client: Any) -> Callable[[], Awaitable[bool]]:
    async def is_registered() -> bool:
        return bool(client.hexists(SERVICES_KEY, "shop"))

    return is_registered


async def test_full_redis_gets_captures_once_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    with server() as started, redis.Redis.from_url(started.url) as admin:
        target = middleware(started.url)
        await ask(target, 1)
        await shipped(target, 1)
        admin.config_set("maxmemory", 1)
        await ask(target, QUEUE + 5)
        await failing(caplog)
        await ask(target, QUEUE)
        admin.config_set("maxmemory", 0)
        await shipped(target, QUEUE + 1)
        await target.aclose()

        assert len(await captures(started.url)) == target.queue.shipped_count
    assert "OOM" in caplog.text or "maxmemory" in caplog.text
    assert target.queue.drop_counts["queue_count"] > 0
    assert set(target.queue.drop_counts) == {"queue_count"}
    assert balanced(target, 2 * QUEUE + 6)


async def test_replica_gets_captures_once_it_is_a_master(caplog: pytest.LogCaptureFixture) -> None:
    with server() as started, redis.Redis.from_url(started.url) as admin:
        target = middleware(started.url)
        await ask(target, 1)
        await shipped(target, 1)
        admin.replicaof("127.0.0.1", find_free_port())
        await ask(target, 5)
        await failing(caplog)
        admin.replicaof("NO", "ONE")
        await shipped(target, 6)
        await target.aclose()

    assert not target.queue.drop_counts


async def test_read_only_user_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with server() as started, redis.Redis.from_url(started.url) as admin:
        admin.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+@connection")
        url = started.url.replace("//", "//reader:secret@")
        target = middleware(url, flush_timeout=0.3)
        await ask(target, 5)
        await failing(caplog)
        await target.aclose()

    assert target.queue.drop_counts == {"shutdown": 5}
    assert "secret" not in caplog.text


async def test_replaced_redis_gets_script_and_service(caplog: pytest.LogCaptureFixture) -> None:
    port = find_free_port()
    target = middleware(f"redis://127.0.0.1:{port}/0")
    with server(port=port):
        await ask(target, 1)
        await shipped(target, 1)
    await ask(target, 3)
    await failing(caplog)
    with server(port=port) as started, redis.Redis.from_url(started.url) as admin:
        await shipped(target, 4)
        await target.aclose()

        assert admin.hgetall(SERVICES_KEY) == {b"shop": b"1"}
        assert len(await captures(started.url)) == 3


async def test_flushed_script_cache_loses_no_capture(redis_url: str) -> None:
    target = middleware(redis_url)
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        await ask(target, 2)
        await shipped(target, 2)
        await admin.script_flush()
        await ask(target, 2)
        await target.aclose()

    assert len(await captures(redis_url)) == 4
    assert not target.queue.drop_counts


async def test_queue_bytes_limits_the_queue(redis_url: str) -> None:
    async def large(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(10_000)})

    target = ParallelRunMiddleware(large, service="shop", redis_url=redis_url, queue_bytes=30_000, export_interval=60)
    for _ in range(5):
        await call(target, sampled())

    assert target.queue.drop_counts == {"queue_bytes": 3}
    assert target.queue.bytes <= 30_000
    await target.aclose()
    assert target.queue.shipped_count == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (SettingsKwargs(redis_pairs=3), "redis_rejected_pairs"),
        (SettingsKwargs(redis_bytes=3000), "redis_rejected_bytes"),
    ],
)
async def test_rejected_captures_are_counted(settings: SettingsKwargs, reason: str, redis_url: str) -> None:
    target = middleware(redis_url, **settings)
    await ask(target, 20)
    await target.aclose()
    stored_count = len(await captures(redis_url))

    assert target.queue.drop_counts == {reason: 20 - stored_count}
    assert target.queue.shipped_count == stored_count > 0


async def test_permanently_rejected_batch_is_dropped(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        await admin.set(KEYS.stats, "not a hash")
        target = middleware(redis_url)
        await ask(target, 3)

        async def dropped() -> bool:
            return target.queue.drop_counts["redis_error"] == 3

        await eventually_async(dropped, description="the batch is given up")
        await admin.delete(KEYS.stats)
    await ask(target, 2)
    await target.aclose()

    assert target.queue.shipped_count == 2
    assert caplog.text.count("they stay queued") == 1


async def test_unencodable_capture_stops_no_other(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def answer_unencodable(scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["path"] == "/odd":
            scope["route"] = type("Odd", (), {"path_format": "\ud800"})()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    target = ParallelRunMiddleware(answer_unencodable, service="shop", redis_url=redis_url)
    for path in ("/a", "/odd", "/b", "/odd"):
        await call(target, sampled(path))
    await target.aclose()

    assert (target.queue.shipped_count, target.queue.drop_counts) == (2, {"encode_error": 2})
    assert caplog.text.count("recording failed in encoding") == 1


async def test_pair_id_selects_the_shard(redis_url: str) -> None:
    target = middleware(redis_url, shards=3)
    await ask(target, 30)
    await target.aclose()
    counts = [len(await captures(redis_url, shard=shard)) for shard in range(3)]

    assert sum(counts) == 30
    assert all(counts)


async def test_each_process_reports_its_totals(redis_url: str) -> None:
    target = middleware(redis_url, release="r1")
    await ask(target, 3)
    await target.aclose()
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        reports = await admin.hgetall(reports_key("shop"))
    ((process, text),) = reports.items()
    report = orjson.loads(text)

    assert report["id"].encode() == process
    assert (report["pid"], report["service"], report["release"]) == (os.getpid(), "shop", "r1")
    assert (report["captured"], report["shipped"], report["versions"]) == (3, 3, {"old": 3})
    assert (report["dropped"], report["queue"]) == ({}, {"count": 0, "bytes": 0})
    assert abs(report["seen"] - time.time()) < 5


async def test_report_is_at_most_a_second_old(redis_url: str) -> None:
    target = middleware(redis_url)
    await ask(target, 3)
    async with redis.asyncio.Redis.from_url(redis_url) as admin:

        async def reported() -> bool:
            reports = await admin.hgetall(reports_key("shop"))
            return [orjson.loads(text)["shipped"] for text in reports.values()] == [3]

        await eventually_async(reported, within=3, description="the report says 3")
    await target.aclose()


async def test_capture_arrives_soon_after_the_answer(redis_url: str) -> None:
    target = middleware(redis_url)
    await ask(target, 1)
    await shipped(target, 1)
    start = time.monotonic()
    await ask(target, 1)
    await shipped(target, 2)

    assert time.monotonic() - start < 0.5
    await target.aclose()


async def test_redis_down_keeps_no_request_alive(caplog: pytest.LogCaptureFixture) -> None:
    """Scopes may hold large objects of the app, so the queue must not keep them."""
    target = middleware(f"redis://127.0.0.1:{find_free_port()}/0", flush_timeout=0.1)
    await ask(target, 10)
    await failing(caplog)

    async def assembled() -> bool:
        return not target.queue.recorders

    await eventually_async(assembled, within=2, description="recorders are let go")
    assert target.queue.count == 10
    await target.aclose()


async def test_exporter_logs_nothing_without_errors(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="abreast")
    target = middleware(redis_url)
    await ask(target, 5)
    await target.aclose()

    assert not [record for record in caplog.records if record.name == "abreast"]


async def test_unsampled_request_starts_no_exporter() -> None:
    target = middleware("redis://127.0.0.1:1/0")
    messages: list[Message] = (await call(target, http_scope()))[0]

    assert len(messages) == 2
    assert len(asyncio.all_tasks()) == 1


async def test_key_rotates_without_restart_and_makes_no_difference(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has not read the new key yet hashes equal secrets to other values, which must not differ."""
    monkeypatch.setattr(RotatingRedactor, "REFRESH_INTERVAL_S", 0.0)
    file, first_key = tmp_path / "redact-key", "f" * 32
    file.write_text(first_key)
    tokens = {"old": "hunter2", "new": "hunter2"}

    def make_middleware(version: Version, **key: Unpack[SettingsKwargs]) -> ParallelRunMiddleware:
        async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [JSON_HEADER]})
            await send({"type": "http.response.body", "body": orjson.dumps({"token": tokens[version]})})

        settings: SettingsKwargs = {"service": "shop", "redis_url": redis_url, "export_interval": 0.01, **key}
        return ParallelRunMiddleware(answer, **settings)

    async def compare(*sides: ParallelRunMiddleware) -> tuple[str, list[str]]:
        """Return the outcome of one more pair, and the ids of its keys."""
        count, pair = len(await captures(redis_url)), pair_id()
        for (version, role), side in zip(VERSIONS, sides, strict=True):
            await call(side, http_scope("/", "GET", marks(pair, version=version, role=role)))

        async def are_sent() -> bool:
            return len(await captures(redis_url)) == count + 2

        await eventually_async(are_sent, description="both captures are in Redis")
        found = [capture for capture in await captures(redis_url) if capture.pair == pair]
        return compare_pair(found, CompareOptions()).outcome, [capture.redaction_key_id for capture in found]

    old, new = (make_middleware(version, redact_key_file=str(file)) for version, _ in VERSIONS)
    late = make_middleware("new", redact_key=first_key)
    first_id = Redactor(first_key).key_id
    assert await compare(old, new) == ("match", [first_id, first_id])

    result = await asyncio.to_thread(
        CliRunner().invoke, abreast, ["key", "rotate", "--file", str(file), "--after", "0s"]
    )
    assert result.exit_code == 0, result.output

    async def is_rotated() -> bool:
        outcome, key_ids = await compare(old, new)
        assert outcome == "match"
        return key_ids[0] == key_ids[1] != first_id

    await eventually_async(is_rotated, description="both processes use the new key")
    outcome, key_ids = await compare(old, late)
    assert (outcome, key_ids[0] != key_ids[1]) == ("match", True)
    tokens["new"] = "hunter3"
    assert (await compare(old, new))[0] == "mismatch"
    for side in (old, new, late):
        await side.aclose()
