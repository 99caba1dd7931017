"""Clocks that jump under load, and come back: every pair has one row in the end, none counts twice, and nobody acts on it."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from abreast.protocol.join import Limits
from abreast.v1 import rollout_pb2 as pb
from abreast.v1 import rollout_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from abreast_sidecar.ingest.stream import StreamConsumer
from abreast_sidecar.jobs.retention import expire_incomplete_pairs
from abreast_sidecar.redis_client import connect_redis, list_shards
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_clock import Clock, postgres_by, redis_by
from support_load import Load, complete, empty, loading
from support_pairs import capture, make_record, outcomes, pair_of, query_value, run_worker, send, stats
from support_replica import Replica, replica

pytestmark = pytest.mark.clocks

TESTS = Path(__file__).parents[1]
JUMPS = ("+1h", "+400d", "-1h")
DAY = 86_400_000  # ms
AGES = (1, 5, 13)  # days of what is kept
SOME = 40  # pairs that come meanwhile
MOST = 100_000

SERVICE_PROCESS = """
import asyncio, sys
from abreast.middleware import ParallelRunMiddleware
from support_middleware import call, http_scope, marks

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answer"})

async def main(url):
    service = ParallelRunMiddleware(app, service="shop", redis_url=url)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while pair := (await lines.readline()).decode().strip():
        for version, role in (("old", "live"), ("new", "shadow")):
            await call(service, http_scope("/", headers=marks(pair, version=version, role=role)))
    await asyncio.sleep(60)

asyncio.run(main(sys.argv[1]))
"""

ERRORS = """
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, failed_over, old_status)
select (at at time zone 'utc')::date, gen_random_uuid()::text, at, (select min(id) from abreast.endpoint), 'only_old', 'old', true, 200
from generate_series(1, 20), (select %s::timestamptz as at) as moment
"""


@dataclass
class Parts:
    redis: RedisServer
    postgres: PostgresServer

    @property
    def url(self) -> str:
        return self.postgres.url()

    async def wait_for_pairs(self) -> None:
        """Pairs came to the ledger meanwhile."""
        before = self.pairs()

        async def came() -> bool:
            return self.pairs() >= before + SOME

        await eventually_async(came, description=f"{SOME} more pairs")

    def pairs(self) -> int:
        return int(query_value(self.url, "select count(*) from abreast.pair"))


@contextmanager
def parts(*, redis: Clock | None = None, postgres: Clock | None = None) -> Iterator[Parts]:
    with ExitStack() as stack:
        yield Parts(
            stack.enter_context(redis_by(redis) if redis else RedisServer()),
            stack.enter_context(postgres_by(postgres) if postgres else PostgresServer()),
        )


async def seed(url: str, load: Load) -> None:
    """Days that retention keeps."""
    await migrate(url)
    ledger = PairWriter(url, examples_per_finding=3)
    for age in AGES:
        pair = str(uuid.uuid4())
        await ledger.write([make_record(pair=pair, at=int(time.time() * 1000) - age * DAY)])
        load.pairs[pair] = False
    await ledger.close()


async def jumps(clock: Clock, servers: Parts, folder: Path, load: Load, *, sidecar: Clock | None = None) -> None:
    """During each, and after it, pairs come. A sidecar begins in the widest: its first act is to look for days that are over."""
    for offset in JUMPS:
        clock.jump(offset)
        await servers.wait_for_pairs()
        if offset == "+400d":
            with replica(servers.redis.url, servers.url, folder / "another", clock=sidecar):
                await servers.wait_for_pairs()
        clock.jump("+0")
        await servers.wait_for_pairs()
    load.over = True


def of_now(url: str) -> None:
    """No pair is of a time to come, where windows would not find it."""
    late = "select count(*) from abreast.pair where at > now() + interval '6 minutes'"
    assert query_value(url, late) == 0


@pytest.mark.parametrize("server", ["redis", "postgres"])
async def test_clock_jump_of_a_server_loses_nothing(tmp_path: Path, server: str) -> None:
    with Clock() as clock, parts(**{server: clock}) as servers:
        load = Load(servers.redis.url)
        await seed(servers.url, load)
        with replica(servers.redis.url, servers.url, tmp_path / "all"):
            async with loading(load, MOST):
                await jumps(clock, servers, tmp_path, load)
            await complete(servers.url, load)
            await empty(servers.redis.url)
        of_now(servers.url)


async def test_clock_jump_of_a_sidecar_loses_nothing(tmp_path: Path) -> None:
    with Clock() as clock, parts() as servers:
        load = Load(servers.redis.url)
        await seed(servers.url, load)
        with replica(servers.redis.url, servers.url, tmp_path / "all", clock=clock):
            async with loading(load, MOST):
                await jumps(clock, servers, tmp_path, load, sidecar=clock)
            await complete(servers.url, load)
            await empty(servers.redis.url)
        of_now(servers.url)


async def test_clock_jump_of_a_service_loses_nothing(tmp_path: Path) -> None:
    with Clock() as clock, parts() as servers:
        load = Load(servers.redis.url)
        await seed(servers.url, load)
        with replica(servers.redis.url, servers.url, tmp_path / "all"):
            async with service(servers.redis.url, clock) as process, asking(process, load):
                await jumps(clock, servers, tmp_path, load)
                await complete(servers.url, load)
            await empty(servers.redis.url)
        of_now(servers.url)


@asynccontextmanager
async def service(redis_url: str, clock: Clock) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", SERVICE_PROCESS, redis_url),
        stdin=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(TESTS), **clock.environment},
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def asking(process: asyncio.subprocess.Process, load: Load) -> AsyncIterator[None]:
    """Send requests to both versions until the load ends."""
    requests = process.stdin
    assert requests is not None

    async def ask() -> None:
        while not load.over:
            pair = str(uuid.uuid4())
            load.pairs[pair] = False
            requests.write(f"{pair}\n".encode())
            await asyncio.sleep(load.pace)

    task = asyncio.create_task(ask())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_incomplete_pair_expires_after_redis_clock_is_set_back(tmp_path: Path) -> None:
    with Clock() as clock, parts(redis=clock) as servers:
        await migrate(servers.url)
        with replica(servers.redis.url, servers.url, tmp_path / "all"):
            clock.jump("+400d")
            send(servers.redis.url, [capture("alone", "old")], bounds=Limits(wait_ms=1500))
            expiry_count = stats(servers.redis.url).get("looked", 0)

            async def swept() -> bool:
                return stats(servers.redis.url).get("looked", 0) > expiry_count + DAY

            await eventually_async(swept, description="a sweep by the wrong clock")
            clock.jump("+0")
            await eventually_async(lambda: lone(servers.url), description="the pair is swept")


async def lone(url: str) -> bool:
    return outcomes(url) == {"only_old": 1}


async def test_abandoned_entries_are_claimed_after_redis_clock_is_set_back() -> None:
    with Clock() as clock, parts(redis=clock) as servers:
        await migrate(servers.url)
        clock.jump("+400d")
        send(servers.redis.url, pair_of())
        dead = StreamConsumer(servers.redis.url, name="dead", batch_size=10, claim_idle_s=60)
        assert len(await dead.read()) == 1
        client = connect_redis(servers.redis.url)
        (keys,) = await list_shards(client)
        await expire_incomplete_pairs(client, keys)
        clock.jump("+0")
        await expire_incomplete_pairs(client, keys)
        settings = Settings(redis_url=servers.redis.url, postgres_url=servers.url, claim_idle=0.5)
        async with run_worker(settings):
            await eventually_async(lambda: matched(servers.url), description="the pair is in the ledger")
        await client.aclose()
        await dead.close()


async def matched(url: str) -> bool:
    return outcomes(url) == {"match": 1}


async def test_guard_ignores_old_evidence_with_postgres_clock_behind(tmp_path: Path) -> None:
    with Clock() as clock, parts(postgres=clock) as servers:
        await seed(servers.url, Load(servers.redis.url))
        with replica(servers.redis.url, servers.url, tmp_path / "all") as sidecar:
            await guarded(sidecar, servers)
            wrong(servers, dt.timedelta(minutes=30))
            clock.jump("-1h")
            await ledger_goes_on(servers)
            await wait_for_look(servers)
            assert query_value(servers.url, "select new_share from abreast.traffic") == 5000

            wrong(servers, dt.timedelta())
            await eventually_async(lambda: back(servers), description="the guard rolls back")


async def guarded(sidecar: Replica, servers: Parts) -> None:
    """Half of the users have been on new for two hours."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{sidecar.port}") as channel:
        half = traffic_pb2.UpdateTrafficRequest(new_share=0.5, actor="ada", reason="x", wait=Duration())
        await traffic_pb2_grpc.TrafficServiceStub(channel).UpdateTraffic(half)
        policy = pb.GuardPolicy(mode=pb.GUARD_MODE_ACTING)
        request = pb.SetGuardRequest(policy=policy, actor="ada", reason="x")
        await rollout_pb2_grpc.RolloutServiceStub(channel).SetGuard(request)
    with psycopg.connect(servers.url) as admin:
        admin.execute("update abreast.guard set since = since - interval '2 hours'")
        admin.execute("update abreast.traffic_event set at = at - interval '2 hours'")
        admin.execute("update abreast.traffic set version = version + 1")  # so that it is read again


def wrong(servers: Parts, ago: dt.timedelta) -> None:
    """Users' requests that old had to answer for new."""
    with psycopg.connect(servers.url) as admin:
        admin.execute(ERRORS.encode(), (dt.datetime.now(dt.UTC) - ago,))


async def ledger_goes_on(servers: Parts) -> None:
    before = servers.pairs()
    send(servers.redis.url, pair_of())

    async def came() -> bool:
        return servers.pairs() > before

    await eventually_async(came, description="one more pair")


async def wait_for_look(servers: Parts) -> None:
    """Wait until the guard has evaluated twice."""
    for _ in range(2):
        before = query_value(servers.url, "select checked_at from abreast.guard")

        async def has_looked_again(before: object = before) -> bool:
            return bool(query_value(servers.url, "select checked_at from abreast.guard") != before)

        await eventually_async(has_looked_again, description="the guard looks")


async def back(servers: Parts) -> bool:
    return bool(query_value(servers.url, "select rolled_back from abreast.traffic"))
