from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import certifi
import psycopg
import pytest
from hypothesis import HealthCheck, settings

from abreast_sidecar.stack.servers import POSTGRES_SUPERUSER, PostgresServer, RedisServer
from support_certificate import self_signed
from support_database import LedgerDatabases, empty_database
from support_postgres import disconnect

SCRAM_ITERATIONS_SINCE = 160_000  # the Postgres version that has the setting

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# Servers are started while gRPC's threads run; its handlers for forks then crash the new process.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# In the background of a script SIGINT is ignored, and so it would be in every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def small_ca_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each httpx client reads the bundle, and certifi's costs 25 ms of CPU. Tests talk to this machine only."""
    bundle = str(self_signed(tmp_path_factory.mktemp("ca"), "localhost").certificate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: bundle)
        patch.setenv("SSL_CERT_FILE", bundle)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    binaries = os.environ.get("ABREAST_TEST_POSTGRES")
    with PostgresServer(binaries=Path(binaries) if binaries else None, options=("max_connections=200",)) as server:
        _hash_password_once(server)
        yield server
        disconnect()


def _hash_password_once(server: PostgresServer) -> None:
    """Tests open thousands of connections, and 4,096 rounds of SCRAM cost 5 ms of CPU each."""
    with psycopg.connect(server.url(), autocommit=True) as admin:
        if admin.info.server_version >= SCRAM_ITERATIONS_SINCE:
            admin.execute("set scram_iterations = 1")
            admin.execute(f"alter role {POSTGRES_SUPERUSER} password '{server.password}'".encode())


@pytest.fixture(scope="session")
def ledger_databases(postgres_server: PostgresServer) -> Iterator[LedgerDatabases]:
    with LedgerDatabases(postgres_server) as databases:
        yield databases


@pytest.fixture
def postgres_url(ledger_databases: LedgerDatabases) -> Iterator[str]:
    """A database with the ledger's schema and nothing else in it."""
    with ledger_databases.lend() as url:
        yield url


@pytest.fixture
def empty_postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database without a schema."""
    with empty_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    binary = os.environ.get("ABREAST_TEST_REDIS")
    with RedisServer(binary=Path(binary) if binary else None) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty Redis for each test. Tests that stop or limit the server start one of their own."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
