from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from abreast_sidecar.embedded import PostgresServer, RedisServer

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# Servers are started while gRPC's threads run; its handlers for forks then crash the new process.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# In the background of a script SIGINT is ignored, and so it would be in every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    binaries = os.environ.get("ABREAST_TEST_POSTGRES")
    with PostgresServer(
        binaries=Path(binaries) if binaries else None, options=("max_connections=200",)
    ) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database of its own for each test."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
        yield postgres_server.url(name)
        admin.execute(f"drop database {name} with (force)".encode())


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
