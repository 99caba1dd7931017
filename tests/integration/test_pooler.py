"""The whole sidecar on Postgres through a pooler in transaction mode. Runs where PgBouncer is installed; see other_servers.sh."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import grpc
import psycopg
import pytest

from abreast.v1 import comparison_pb2, comparison_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from abreast_sidecar.app import serve
from abreast_sidecar.cli.doctor import servers as postgres_checks
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.redis_client import connect_redis
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import database
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.traffic.control import TrafficController
from support import eventually_async, free_ports
from support_load import Load, agrees, complete, loading
from support_pairs import query_value, run_worker
from support_pooler import pooled

pytestmark = pytest.mark.pooler


@pytest.fixture
def pooler_url(empty_postgres_url: str) -> Iterator[str]:
    with pooled(empty_postgres_url) as url:
        yield url


async def test_pooler_supports_sidecar_with_three_workers(
    redis_url: str, empty_postgres_url: str, pooler_url: str
) -> None:
    rpc, web = free_ports(2)
    settings = Settings(
        redis_url=redis_url,
        postgres_url=pooler_url,
        postgres_direct_url=empty_postgres_url,
        grpc_listen=f"127.0.0.1:{rpc}",
        http_listen=f"127.0.0.1:{web}",
        collector_listen="127.0.0.1:0",
        batch_size=20,
    )
    stop, load = asyncio.Event(), Load(redis_url)
    sidecar = asyncio.create_task(serve(settings, stop))
    try:
        async with grpc.aio.insecure_channel(settings.grpc_listen) as channel:
            await asyncio.wait_for(channel.channel_ready(), 15)
            async with run_worker(settings, "two"), run_worker(settings, "three"), loading(load, 300):
                pass
            await complete(empty_postgres_url, load)
            request = comparison_pb2.GetSummaryRequest(service="shop")
            summary = await comparison_pb2_grpc.ComparisonServiceStub(channel).GetSummary(request)
            change = traffic_pb2.RollbackRequest(service="shop", reason="a test")
            await traffic_pb2_grpc.TrafficServiceStub(channel).Rollback(change)
            facts = await asyncio.to_thread(postgres_checks.read_postgres_facts, pooler_url)
    finally:
        stop.set()
        await sidecar

    assert summary.pairs == 300
    assert facts.pairs == 300
    agrees(empty_postgres_url)
    assert query_value(empty_postgres_url, "select count(*) from abreast.traffic_event where action = 'rollback'") == 1


async def test_pooler_setup_notifies_other_sidecar_immediately(
    redis_url: str, empty_postgres_url: str, pooler_url: str
) -> None:
    """LISTEN needs a separate session. Through the pooler it gets no notification, and polls every five seconds."""
    settings = Settings(redis_url=redis_url, postgres_url=pooler_url, postgres_direct_url=empty_postgres_url)
    await migrate(pooler_url)
    stop, opened = asyncio.Event(), Database(pooler_url)
    await opened.open()
    redis = connect_redis(redis_url)
    control, other = TrafficController(opened, redis, settings), TrafficController(opened, redis, settings)
    task = asyncio.create_task(control.run(stop))
    with psycopg.connect(empty_postgres_url, autocommit=True) as look:

        async def listens() -> bool:
            row = look.execute("select count(*) from pg_stat_activity where query like 'listen %'").fetchone()
            return row == (1,)

        await eventually_async(listens, description="it listens")
    await other.read("shop")  # makes its first state

    async def heard() -> bool:
        return control.current("shop") is not None

    await eventually_async(heard, within=3, description="the other has heard, before it looks again by itself")
    stop.set()
    await task
    await opened.close()
    await redis.aclose()


async def test_pooler_sessions_have_statement_limits(pooler_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SESSION_LIMITS", database.SESSION_LIMITS.replace("'20s'", "'200ms'"))
    opened = Database(pooler_url)
    await opened.open()
    try:
        async with opened.connection() as connection:
            zone = await (await connection.execute("show timezone")).fetchone()
        with pytest.raises(LedgerError, match="took more than"):
            async with opened.connection() as connection:
                await connection.execute("select pg_sleep(5)")
    finally:
        await opened.close()

    assert zone == {"TimeZone": "UTC"}


async def test_pooler_is_clean_after_killed_workers(redis_url: str, empty_postgres_url: str, pooler_url: str) -> None:
    await migrate(pooler_url)
    settings = Settings(redis_url=redis_url, postgres_url=pooler_url, claim_idle=0.3, batch_size=20)
    load = Load(redis_url)
    with psycopg.connect(empty_postgres_url, autocommit=True) as admin:
        async with run_worker(settings), loading(load, 300):
            for _ in range(5):
                await asyncio.sleep(0.1)  # at some point of a batch
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()"
                )
    async with run_worker(replace(settings, batch_size=100)):
        await complete(empty_postgres_url, load)
