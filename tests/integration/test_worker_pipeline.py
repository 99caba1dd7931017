from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import redis
import structlog
from msgspec import structs

from abreast.protocol.join import CONSUMER_GROUP, Keys, Limits
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import evaluate_entry
from abreast_sidecar.ingest.stream import StreamEntry
from abreast_sidecar.ingest.worker import SMALL_BATCH_DELAY_S
from abreast_sidecar.jobs.retention import expire_incomplete_pairs
from abreast_sidecar.redis_client import connect_redis
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.writer import PairWriter
from support import WITHIN, eventually_async
from support_captures import encode
from support_pairs import (
    SERVICE,
    add_entry,
    capture,
    outcomes,
    pair_of,
    query_value,
    ready,
    rows,
    run_jobs,
    run_worker,
    send,
    stats,
)

WORKER = """
import asyncio, sys
from abreast_sidecar.settings import Settings
from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.store.database import Database
settings = Settings(redis_url=sys.argv[1], postgres_url=sys.argv[2], batch_size=50, claim_idle=0.5)
async def main():
    async with Database(settings.postgres_url) as database:
        await Worker(settings, database, name=sys.argv[3]).run(asyncio.Event())
asyncio.run(main())
"""


@pytest.fixture
async def settings(redis_url: str, postgres_url: str) -> Settings:
    return Settings(redis_url=redis_url, postgres_url=postgres_url, claim_idle=0.5, shutdown_timeout=5.0)


async def emptied(settings: Settings, within: float = WITHIN) -> None:
    async def empty() -> bool:
        return ready(settings.redis_url) == 0

    await eventually_async(empty, within=within, description="the stream is empty")


async def test_worker_writes_sent_pair(settings: Settings) -> None:
    send(settings.redis_url, pair_of({"price": 1}, {"price": 2}))
    async with run_worker(settings):
        await emptied(settings)

    pairs = rows(
        settings.postgres_url,
        "select outcome, live, request, old_status, new_status, old_us, old_release, new_release, cardinality(findings) from abreast.pair",
    )
    assert pairs == [("mismatch", "old", "/products/7?page=1", 200, 200, 2000, "old-1", "new-1", 1)]
    assert rows(settings.postgres_url, "select method, route from abreast.endpoint") == [("GET", "/products/{id}")]
    assert rows(settings.postgres_url, "select part, path, kind, count from abreast.finding") == [
        ("body", "$.price", "changed", 1)
    ]


async def test_worker_writes_differing_effects_as_finding(settings: Settings) -> None:
    mail = {"kind": "email.send", "payload": {"to": "a@b"}, "at_us": 9}
    old, new = pair_of({"price": 1}, {"price": 1})
    changed = {**mail, "payload": {"to": "c@d"}}
    send(settings.redis_url, [structs.replace(old, effects=(mail, mail)), structs.replace(new, effects=(changed,))])
    async with run_worker(settings):
        await emptied(settings)

    query = "select part, path, kind, impact from abreast.finding order by path"
    assert rows(settings.postgres_url, query) == [
        ("effect", "email.send", "removed", "breaking"),
        ("effect", "email.send.$.to", "changed", "value"),
    ]


async def test_worker_collects_pairs_of_slow_traffic_into_few_commits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    write = PairWriter.write

    async def record(writer: PairWriter, records: Sequence[PairRecord], **options: Any) -> int:
        batches.append(len(records))
        return await write(writer, records, **options)

    monkeypatch.setattr(PairWriter, "write", record)
    async with run_worker(settings):
        started = time.monotonic()
        for _ in range(50):
            send(settings.redis_url, pair_of())
            await asyncio.sleep(0.02)
        await emptied(settings)
        duration = time.monotonic() - started

    assert sum(batches) == 50
    assert len(batches) <= 2 + duration / SMALL_BATCH_DELAY_S


async def test_worker_frees_bytes_of_committed_entries(settings: Settings) -> None:
    for _ in range(20):
        send(settings.redis_url, pair_of())
    bytes_before = stats(settings.redis_url)["bytes"]
    async with run_worker(settings):
        await emptied(settings)

    assert bytes_before > 0
    assert stats(settings.redis_url)["bytes"] == 0


async def test_worker_counts_repeated_entries_once(settings: Settings) -> None:
    captures = pair_of({"price": 1}, {"price": 2})
    fields: dict[str, bytes | str] = {"pair": captures[0].pair, "why": "joined"}
    fields |= {capture.slot: encode(capture) for capture in captures}
    for _ in range(3):
        add_entry(settings.redis_url, fields)
    async with run_worker(settings):
        await emptied(settings)
        add_entry(settings.redis_url, fields)
        await emptied(settings)

    assert outcomes(settings.postgres_url) == {"mismatch": 1}
    assert query_value(settings.postgres_url, "select count from abreast.finding") == 1
    assert query_value(settings.postgres_url, "select sum(pairs) from abreast.outcome_count") == 1


async def test_worker_claims_entries_of_killed_worker_once(settings: Settings) -> None:
    """Both workers are held up in the middle of a batch; one is killed there."""
    total = 300
    for number in range(total):
        send(settings.redis_url, pair_of({"n": 1}, {"n": 2 if number % 10 == 0 else 1}))
    urls = (settings.redis_url, settings.postgres_url)
    victim = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, *urls, "victim")
    with psycopg.connect(settings.postgres_url) as gate:
        gate.execute("lock table abreast.pair in exclusive mode")
        await eventually_async(lambda: holds(settings, "victim"), description="the victim holds entries")
        async with run_worker(replace(settings, batch_size=50), "survivor"):
            await eventually_async(lambda: holds(settings, "survivor"), description="the survivor holds entries")
            victim.kill()
            gate.rollback()
            await emptied(settings)
    await victim.wait()

    assert outcomes(settings.postgres_url) == {"match": total - total // 10, "mismatch": total // 10}
    assert query_value(settings.postgres_url, "select count from abreast.finding") == total // 10
    assert query_value(settings.postgres_url, "select sum(pairs) from abreast.outcome_count") == total
    assert stats(settings.redis_url)["bytes"] == 0


async def holds(settings: Settings, name: str) -> bool:
    with redis.Redis.from_url(settings.redis_url) as client:
        keys = Keys(SERVICE, 0)
        if not client.xinfo_groups(keys.ready):
            return False
        consumers = client.xinfo_consumers(keys.ready, CONSUMER_GROUP)
        return any(consumer["name"] == name.encode() and consumer["pending"] > 0 for consumer in consumers)


async def test_worker_of_same_name_resumes_pending_entries(settings: Settings) -> None:
    patient = Settings(redis_url=settings.redis_url, postgres_url=settings.postgres_url, claim_idle=600.0)
    keys = Keys(SERVICE, 0)
    for _ in range(30):
        send(settings.redis_url, pair_of())
    with redis.Redis.from_url(settings.redis_url) as client:
        client.xgroup_create(keys.ready, CONSUMER_GROUP, id="0")
        client.xreadgroup(CONSUMER_GROUP, "worker-1", {keys.ready: ">"}, count=20)
    async with run_worker(patient, "worker-1"):
        await emptied(settings, within=10)

    assert outcomes(settings.postgres_url) == {"match": 30}


async def test_worker_survives_restart_of_postgres(redis_url: str) -> None:
    total = 400
    with PostgresServer(options=("synchronous_commit=on",)) as server:
        await migrate(server.url())
        settings = Settings(redis_url=redis_url, postgres_url=server.url(), batch_size=20, claim_idle=0.5)
        async with run_worker(settings):
            for number in range(total):
                send(redis_url, pair_of({"n": 1}, {"n": 2}))
                if number in (100, 250):
                    server.process.popen.send_signal(signal.SIGQUIT)  # type: ignore[union-attr]  # an immediate end
                    server.process.popen.wait()  # type: ignore[union-attr]
                    await asyncio.sleep(0.1)
                    server.start()
                await asyncio.sleep(0)
            await emptied(settings)

        assert outcomes(server.url()) == {"mismatch": total}
        assert query_value(server.url(), "select count from abreast.finding") == total
        assert query_value(server.url(), "select sum(pairs) from abreast.outcome_count") == total


async def test_worker_waits_for_servers_and_schema() -> None:
    redis_server, postgres = RedisServer(), PostgresServer()
    settings = Settings(
        redis_url=redis_server.url, postgres_url="postgresql://postgres:x@127.0.0.1:1/postgres", shutdown_timeout=1.0
    )
    async with run_worker(settings) as worker:
        await asyncio.sleep(0.3)
        assert worker.is_running
        assert worker.last_heartbeat == 0.0
    with redis_server, postgres:
        settings = Settings(redis_url=redis_server.url, postgres_url=postgres.url(), claim_idle=0.5)
        async with run_worker(settings):
            send(redis_server.url, pair_of())
            await asyncio.sleep(0.3)  # long enough to fail on the missing schema
            await migrate(postgres.url())
            await emptied(settings)

        assert outcomes(postgres.url()) == {"match": 1}


async def test_worker_continues_after_redis_lost_its_data(postgres_url: str) -> None:
    server = RedisServer()
    with server:
        settings = Settings(redis_url=server.url, postgres_url=postgres_url, claim_idle=0.5)
        async with run_worker(settings):
            send(server.url, pair_of())
            await emptied(settings)
            server.stop()
            await asyncio.sleep(0.2)
            server.start()
            send(server.url, pair_of())
            await emptied(settings)

    assert outcomes(postgres_url) == {"match": 2}


async def test_worker_makes_undecodable_entry_a_dead_letter(settings: Settings) -> None:
    url = settings.redis_url
    good = pair_of()
    newer = encode(good[0]).replace(b'"v":1', b'"v":99')
    add_entry(url, {"pair": "p1", "why": "joined", "old:live:1": b"\x00\xff nonsense", "new:shadow:1": b""})
    add_entry(url, {"pair": "p2", "why": "joined", "old:live:1": newer, "new:shadow:1": encode(good[1])})
    add_entry(url, {"something": "else"})
    add_entry(url, {"pair": "p4\x00\ud800".encode("utf-8", "surrogatepass"), "why": "timed_out"})
    send(url, good)
    async with run_worker(settings):
        await emptied(settings)

    assert outcomes(settings.postgres_url) == {"undecodable": 4, "match": 1}
    reasons = [
        reason for (reason,) in rows(settings.postgres_url, "select reason from abreast.dead_letter order by id")
    ]
    assert len(reasons) == 4
    assert any("format 99" in reason for reason in reasons)
    route = (
        "select route from abreast.endpoint join abreast.pair on pair.endpoint_id = endpoint.id where pair.id = 'p2'"
    )
    assert query_value(settings.postgres_url, route) == "/products/{id}"


async def test_worker_continues_after_deeply_nested_captures(settings: Settings) -> None:
    """A nested unknown field can't be decoded, and nested effects may fail in any later step."""
    old, new = pair_of()
    nested = b'{"unknown":' + b"[" * 2000 + b"]" * 2000 + b"," + encode(old)[1:]
    add_entry(
        settings.redis_url, {"pair": "nested", "why": "joined", "old:live:1": nested, "new:shadow:1": encode(new)}
    )
    depths = (100, 253, 300, 700, 900)
    for depth in depths:
        payload: Any = "x"
        for _ in range(depth):
            payload = [payload]
        mail = {"kind": "email.send", "payload": payload}
        old, new = pair_of()
        send(settings.redis_url, [structs.replace(old, effects=(mail,)), new])
    for _ in range(10):
        send(settings.redis_url, pair_of())
    async with run_worker(settings):
        await emptied(settings)

    counts = outcomes(settings.postgres_url)
    assert counts["match"] == 10
    assert sum(counts.values()) == 11 + len(depths)
    assert query_value(settings.postgres_url, "select outcome from abreast.pair where id = 'nested'") == "undecodable"
    assert query_value(settings.postgres_url, "select count(*) from abreast.dead_letter") == counts["undecodable"]


@pytest.mark.parametrize("step", ["evaluate_entry", "write"])
async def test_worker_makes_entry_that_always_fails_a_dead_letter(
    settings: Settings, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs beside it are written, and the log contains no captured value."""
    attempts = Counter[str]()

    def fail(pair: str) -> None:
        attempts[pair] += 1
        if pair == poison[0].pair and attempts[pair] < 100:
            raise RuntimeError("card 4111 1111")

    def evaluate(entry: StreamEntry, rules: CompareOptions) -> PairRecord:
        fail(entry.pair_id)
        return evaluate_entry(entry, rules)

    async def write(writer: PairWriter, records: Sequence[PairRecord], *, rules_version: int | None = None) -> int:
        for record in records:
            if record.dead_letter is None:
                fail(record.pair_id)
        return await original_write(writer, records, rules_version=rules_version)

    original_write, poison = PairWriter.write, pair_of()
    if step == "write":
        monkeypatch.setattr(PairWriter, "write", write)
    else:
        monkeypatch.setattr("abreast_sidecar.ingest.worker.evaluate_entry", evaluate)
    for number in range(20):
        send(settings.redis_url, poison if number == 7 else pair_of())
    with structlog.testing.capture_logs() as logs:
        async with run_worker(settings):
            await emptied(settings)

    assert outcomes(settings.postgres_url) == {"match": 19, "undecodable": 1}
    ((reason,),) = rows(settings.postgres_url, "select reason from abreast.dead_letter")
    assert "RuntimeError" in reason
    assert attempts[poison[0].pair] >= 3
    assert "4111" not in f"{logs} {reason}"


async def test_worker_isolates_rejected_record(settings: Settings) -> None:
    with_check = "alter table abreast.endpoint add check (route <> '/refused')"
    with psycopg.connect(settings.postgres_url) as connection:
        connection.execute(with_check.encode())
    for number in range(40):
        send(settings.redis_url, pair_of(route="/refused" if number in (7, 23) else "/fine"))
    async with run_worker(settings):
        await emptied(settings)

    assert outcomes(settings.postgres_url) == {"match": 38, "undecodable": 2}
    assert (
        query_value(settings.postgres_url, "select count(*) from abreast.dead_letter where reason like '%rejects%'")
        == 2
    )


async def test_worker_replaces_nul_and_lone_surrogates(settings: Settings) -> None:
    send(settings.redis_url, pair_of({"a\0b": "x\0"}, {"a\0b": "y\0", "\ud800": 1}))
    async with run_worker(settings):
        await emptied(settings)

    assert sum(outcomes(settings.postgres_url).values()) == 1
    assert "undecodable" not in outcomes(settings.postgres_url)
    assert query_value(settings.postgres_url, "select count(*) from abreast.example") == 1


async def test_worker_limits_findings_of_an_endpoint(settings: Settings) -> None:
    generator = random.Random(7)
    for _ in range(30):
        names = [uuid.UUID(int=generator.getrandbits(128)).hex + "zz" for _ in range(190)]
        send(settings.redis_url, pair_of({f"k{n}": 1 for n in names}, {f"k{n}": 2 for n in names}))
    async with run_worker(settings):
        await emptied(settings)

    assert outcomes(settings.postgres_url) == {"mismatch": 30}
    assert query_value(settings.postgres_url, "select count(*) from abreast.finding") <= 1001
    longest = "select max(octet_length(differences::text)) from abreast.example"
    assert query_value(settings.postgres_url, longest) < 200_000


async def test_incomplete_pairs_expire_and_late_captures_are_counted(settings: Settings) -> None:
    soon = Limits(wait_ms=1)
    old, new, third = str(uuid.uuid4()), str(uuid.uuid4()), str(uuid.uuid4())
    send(settings.redis_url, [capture(old, "old"), capture(new, "new", "shadow")], bounds=soon)
    three = [capture(third, "old", arms=3), capture(third, "new", "shadow", arms=3)]
    send(settings.redis_url, three, bounds=soon)
    stop = asyncio.Event()
    housekeeping = asyncio.create_task(run_jobs(settings, stop))
    async with run_worker(settings):
        await eventually_async(lambda: is_counted(settings, 3), description="three rows")
    late = send(settings.redis_url, [capture(old, "new", "shadow")])
    async with run_worker(settings):
        await emptied(settings)
    stop.set()
    await housekeeping

    outcomes = dict(rows(settings.postgres_url, "select id, outcome from abreast.pair"))
    assert outcomes == {old: "late", new: "only_new", third: "match"}
    assert late == [0, 0, 1, 0, 0]
    assert stats(settings.redis_url)["bytes"] == 0
    assert stats(settings.redis_url)["timed_out"] == 3


async def is_counted(settings: Settings, number: int) -> bool:
    return sum(outcomes(settings.postgres_url).values()) == number


async def test_expiry_respects_its_limit_and_loses_nothing(redis_url: str) -> None:
    ids = [str(uuid.uuid4()) for _ in range(450)]
    send(redis_url, [capture(pair, "old") for pair in ids], bounds=Limits(wait_ms=0))
    client, keys = connect_redis(redis_url), Keys(SERVICE, 0)
    first = await expire_incomplete_pairs(client, keys, max_pairs=200)
    with redis.Redis.from_url(redis_url) as sync:
        sync.delete(keys.pair(sync.zrange(keys.due, 0, 0)[0].decode()))  # its captures got lost
        next_expired = await expire_incomplete_pairs(client, keys)
        entries: list[Any] = sync.xrange(keys.ready)
        remaining = sync.zcard(keys.due)
    await client.aclose()

    assert (first, next_expired, remaining) == (200, 250, 0)
    assert {fields[b"pair"].decode() for _, fields in entries} == set(ids)


async def test_worker_counts_pair_of_two_shards_once(settings: Settings) -> None:
    captures = pair_of()
    fields: dict[str, bytes | str] = {"pair": captures[0].pair, "why": "joined"}
    fields |= {capture.slot: encode(capture) for capture in captures}
    add_entry(settings.redis_url, fields, shard=0)
    add_entry(settings.redis_url, fields, shard=1)
    async with run_worker(settings):
        await eventually_async(lambda: drained(settings, 2), description="both streams are empty")

    assert outcomes(settings.postgres_url) == {"match": 1}


async def drained(settings: Settings, shards: int) -> bool:
    return all(ready(settings.redis_url, shard) == 0 for shard in range(shards))


async def test_worker_commits_read_entries_when_stopping(settings: Settings) -> None:
    for _ in range(200):
        send(settings.redis_url, pair_of())
    async with run_worker(settings):
        await eventually_async(lambda: started(settings), description="the first rows")
    with redis.Redis.from_url(settings.redis_url) as client:
        pending = client.xpending(Keys(SERVICE, 0).ready, CONSUMER_GROUP)

    assert pending["pending"] == 0
    assert sum(outcomes(settings.postgres_url).values()) + ready(settings.redis_url) == 200


async def started(settings: Settings) -> bool:
    return sum(outcomes(settings.postgres_url).values()) > 0


async def test_worker_stores_any_json(settings: Settings) -> None:
    values = [{"n": 1e400}, {"n": 2**70}, [[[[]]]], "x" * 5000, {"": {"": None}}, {"a.b[0]": 1, "…": 2}]
    for value in values:
        send(settings.redis_url, pair_of(json.loads(json.dumps(value)), {"other": 1}))
    async with run_worker(settings):
        await emptied(settings)

    assert outcomes(settings.postgres_url) == {"mismatch": len(values)}
