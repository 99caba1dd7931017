from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import certifi
import psycopg
import pytest
import yaml
from hypothesis import HealthCheck, settings

from abreast_sidecar.stack.servers import POSTGRES_SUPERUSER, PostgresServer, RedisServer
from support_certificate import self_signed
from support_database import LedgerDatabases, disconnect, empty_database

SCRAM_ITERATIONS_SINCE = 160_000  # the first Postgres version with the setting

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# Tests start servers while gRPC's threads run. Its fork handlers then crash the new process.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# A script's `&` makes pytest and every process that a test starts ignore SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name long bytes by their length: each process compresses them at another time, and must find the same names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) and len(val) > 16 else None


@pytest.fixture(scope="session", autouse=True)
def small_ca_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Replace the CA bundle of certifi, which costs each httpx client 25 ms of CPU. Tests need no public CA."""
    bundle = str(self_signed(tmp_path_factory.mktemp("ca"), "unused.example").certificate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: bundle)
        patch.setenv("SSL_CERT_FILE", bundle)
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_yaml_loader() -> Iterator[None]:
    """Parse YAML with libyaml. The Python loader needs 150 ms of CPU for the configuration of each Envoy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "safe_load", functools.partial(yaml.load, Loader=yaml.CSafeLoader))
        yield


@pytest.fixture(scope="session", autouse=True)
def initdb_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy the files of the first new Postgres to the others, because initdb costs 1.6 s of CPU."""
    template_root, initialise = tmp_path_factory.mktemp("initdb"), PostgresServer._initialise

    def initialise_from_template(server: PostgresServer, home: Path, data: Path) -> None:
        template = template_root / str(server.binaries).replace("/", "_")
        if not template.exists():
            initialise(server, home, data)
            template.mkdir()
            subprocess.run(["cp", "-a", data, home / "password", template], check=True)
        else:
            subprocess.run(["cp", "-a", template / data.name, template / "password", home], check=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PostgresServer, "_initialise", initialise_from_template)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    binaries = os.environ.get("ABREAST_TEST_POSTGRES")
    with PostgresServer(binaries=Path(binaries) if binaries else None, options=("max_connections=200",)) as server:
        _hash_password_once(server)
        yield server
        disconnect()


def _hash_password_once(server: PostgresServer) -> None:
    """Store the password with one round of SCRAM: 4,096 rounds cost 5 ms of CPU per connection."""
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
    """Return the URL of a database with the ledger's schema and no rows."""
    with ledger_databases.lend() as database:
        yield database.url


@pytest.fixture
def empty_postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """Return the URL of a database without a schema."""
    with empty_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    binary = os.environ.get("ABREAST_TEST_REDIS")
    with RedisServer(binary=Path(binary) if binary else None) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Return the URL of an empty Redis. Tests that stop or limit the server must start a separate one."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
