"""An idle sidecar leaves Redis and Postgres alone, and an event ends the silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import psycopg
import pytest
import redis

from abreast.protocol.join import SERVICES_KEY
from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.store.database import listen
from abreast_sidecar.store.writer import PAIRS_CHANNEL, PairWriter
from support import eventually_async
from support_pairs import SERVICE, difference, make_record, query_value
from support_serve import run_sidecar

SETTLED_S = 15.0  # an idle session of Postgres may add its earlier transactions to the statistics 10 s after the last
MEASURED_S = 30.0  # most periodic work runs at least once
MAX_TRANSACTIONS = 60
MAX_COMMANDS = 90  # also those in scripts

pytestmark = [pytest.mark.redis, pytest.mark.postgres]


def count_transactions(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select pg_stat_force_next_flush()")
    query = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"
    return int(query_value(url, query))


def count_commands(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.info("stats")["total_commands_processed"])


@pytest.fixture
def without_autovacuum(postgres_server: PostgresServer) -> Iterator[None]:
    """Stop autovacuum, whose transactions count for the database too."""

    def change(statement: str) -> None:
        with psycopg.connect(postgres_server.url(), autocommit=True) as connection:
            connection.execute(statement.encode())
            connection.execute("select pg_reload_conf()")

    change("alter system set autovacuum = off")
    yield
    change("alter system reset autovacuum")


@asynccontextmanager
async def quiet_sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[None]:
    """Run a sidecar that knows a service, and wait until it is idle."""
    with redis.Redis.from_url(redis_url) as client:
        client.hset(SERVICES_KEY, SERVICE, 1)
    async with run_sidecar(redis_url, postgres_url) as running:

        async def idle() -> bool:
            await asyncio.sleep(0)
            return running.sidecar.leader_tasks.is_leader and not running.sidecar.control.activity.is_recent

        await eventually_async(idle, description="the sidecar is idle")
        yield


@pytest.mark.usefixtures("without_autovacuum")
async def test_idle_sidecar_makes_few_transactions_and_commands(redis_url: str, postgres_url: str) -> None:
    async with quiet_sidecar(redis_url, postgres_url):
        await asyncio.sleep(SETTLED_S)
        before = count_transactions(postgres_url), count_commands(redis_url)
        await asyncio.sleep(MEASURED_S)
        after = count_transactions(postgres_url), count_commands(redis_url)

    assert after[0] - before[0] <= MAX_TRANSACTIONS
    assert after[1] - before[1] <= MAX_COMMANDS


async def test_pairs_of_another_process_end_the_idle_interval_of_jobs(redis_url: str, postgres_url: str) -> None:
    """The noise job has an idle interval of 60 seconds, and the writer's notification starts it at once."""
    async with quiet_sidecar(redis_url, postgres_url):
        writer = PairWriter(postgres_url, examples_per_finding=3)
        await writer.write([make_record([difference()]) for _ in range(60)])
        await writer.close()

        async def classified() -> bool:
            await asyncio.sleep(0)
            return bool(query_value(postgres_url, "select bool_and(reason <> '') from abreast.finding"))

        await eventually_async(classified, within=30.0, description="the finding is classified")


async def test_listener_reads_only_after_a_notification(postgres_url: str) -> None:
    reads = 0

    async def read() -> None:
        nonlocal reads
        reads += 1

    task = asyncio.create_task(listen(postgres_url, {PAIRS_CHANNEL: read}, name="test", probe_interval_s=0.01))
    try:

        async def probed() -> bool:
            query = "select count(*) from pg_stat_activity where application_name = 'test' and query ilike 'notify%'"
            await asyncio.sleep(0)
            return reads == 1 and bool(query_value(postgres_url, query))

        await eventually_async(probed, description="the listener has probed its connection")
        await asyncio.sleep(0.2)
        reads_before = reads
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"notify {PAIRS_CHANNEL}".encode())

        async def notified() -> bool:
            await asyncio.sleep(0)
            return reads == 2

        await eventually_async(notified, description="the listener has read once more")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert reads_before == 1
