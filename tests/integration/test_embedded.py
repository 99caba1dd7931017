from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
import redis

from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from support import eventually


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Where also the user that runs Postgres for root may go, which pytest's own folders don't allow."""
    with TemporaryDirectory(prefix="abreast-test-", dir=tempfile.gettempdir()) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "postgres"


def test_postgres_keeps_its_data_over_a_restart(open_folder: Path) -> None:
    with PostgresServer(open_folder) as server, psycopg.connect(server.url()) as connection:
        connection.execute("create table kept (n int)")
        connection.execute("insert into kept values (7)")
    with PostgresServer(open_folder) as server, psycopg.connect(server.url()) as connection:
        row = connection.execute("select n from kept").fetchone()

    assert row == (7,)


def test_postgres_wants_a_password_on_loopback(postgres_server: PostgresServer) -> None:
    wrong = postgres_server.url().replace(postgres_server.password, "wrong")

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong, connect_timeout=5)


def test_servers_die_with_the_process_that_started_them() -> None:
    program = (
        "import sys, time; from abreast_sidecar.stack.servers import *\n"
        "r = RedisServer().start(); p = PostgresServer().start()\n"
        "print(r.process.pid, p.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)

    assert len(pids) == 2
    for pid in pids:
        eventually(lambda pid=pid: not _running(pid), what=f"process {pid} ends")  # type: ignore[misc]


def test_redis_keeps_its_data_when_it_has_a_folder(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("kept", "7")
    with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"7"


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
