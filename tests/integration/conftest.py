"""Fixtures for tests of one part against real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import redis

from abreast_sidecar.stack.servers import RedisServer
from support_database import LedgerDatabase, LedgerDatabases
from support_serve import QuerySidecar, RunningSidecar, run_sidecar


@pytest.fixture(scope="module")
def module_database(ledger_databases: LedgerDatabases) -> Iterator[LedgerDatabase]:
    with ledger_databases.lend() as database:
        yield database


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_query_sidecar(
    redis_server: RedisServer, module_database: LedgerDatabase
) -> AsyncIterator[RunningSidecar]:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    async with run_sidecar(redis_server.url, module_database.url, kind=QuerySidecar) as sidecar:
        yield sidecar


@pytest_asyncio.fixture(loop_scope="module")
async def query_sidecar(
    module_query_sidecar: RunningSidecar, module_database: LedgerDatabase
) -> AsyncIterator[RunningSidecar]:
    """Yield a sidecar with an empty ledger. The tests of a module share it, and need `asyncio(loop_scope="module")`."""
    yield module_query_sidecar
    await asyncio.to_thread(module_database.clear)
