"""Local Redis and Postgres servers: data, password, and end of life."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import psycopg
import pytest
import redis

from abreast_sidecar.stack.process import find_free_port, is_port_free, remove_folder
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from support import eventually

INTERRUPTS_S = 60.0
MIN_INTERRUPTS = 5  # also on a slow machine


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that the user who runs Postgres for root may enter, unlike the folders of pytest."""
    with TemporaryDirectory(prefix="abreast-test-", dir=tempfile.gettempdir()) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "postgres"


def test_postgres_keeps_data_across_restart(open_folder: Path) -> None:
    with PostgresServer(open_folder) as server, psycopg.connect(server.url()) as connection:
        connection.execute("create table kept (n int)")
        connection.execute("insert into kept values (7)")
    with PostgresServer(open_folder) as server, psycopg.connect(server.url()) as connection:
        row = connection.execute("select n from kept").fetchone()

    assert row == (7,)


def test_postgres_requires_password_on_loopback(postgres_server: PostgresServer) -> None:
    wrong = postgres_server.url().replace(postgres_server.password, "wrong")

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong, connect_timeout=5)


FIRST_START = """
import sys
from pathlib import Path
from abreast_sidecar.cli.up import signals_as_interrupts
from abreast_sidecar.stack.data import DATA_DIRECTORY_MODE, DataDirectory
from abreast_sidecar.stack.servers import PostgresServer
with signals_as_interrupts(), DataDirectory(Path(sys.argv[1])) as data:
    print("locked", flush=True)
    folder = data.create_part("postgres", DATA_DIRECTORY_MODE)
    with PostgresServer(folder, inherited_fds=(data.servers_lock,)):
        print("started", flush=True)
"""


def start_first(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FIRST_START, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_first_start_may_be_interrupted_at_any_moment(open_folder: Path) -> None:
    open_folder.mkdir(mode=0o755)
    began = time.monotonic()
    with start_first(open_folder / "whole") as whole:
        assert whole.stdout is not None
        assert whole.stdout.readline() == "locked\n"
        locked = time.monotonic()
        assert whole.stdout.readline() == "started\n"
        duration = time.monotonic() - locked
    for number in range(30):
        if time.monotonic() - began > INTERRUPTS_S and number >= MIN_INTERRUPTS:
            break
        folder = open_folder / str(number)
        with start_first(folder) as process:
            assert process.stdout is not None
            process.stdout.readline()
            delay = random.uniform(0, duration)  # no secret
            time.sleep(delay)
            sent = random.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
            process.send_signal(sent)
        with start_first(folder) as again:
            output, error = again.communicate(timeout=60)
        assert (again.returncode, output) == (0, "locked\nstarted\n"), f"{sent!r} after {delay:.3f} s: {error}"
        remove_folder(folder)


def test_servers_end_with_the_process_that_started_them() -> None:
    program = (
        "import time; from abreast_sidecar.stack.servers import PostgresServer, RedisServer\n"
        "r = RedisServer().start(); p = PostgresServer().start()\n"
        "print(r.process.pid, p.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)

    assert len(pids) == 2
    for pid in pids:
        eventually(lambda pid=pid: not is_running(pid), description=f"process {pid} ends")  # type: ignore[misc]


def test_redis_with_folder_keeps_data_across_restart(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("kept", "7")
    with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"7"


def test_free_port_is_reserved_until_a_server_listens() -> None:
    port = find_free_port()

    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert is_port_free("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):  # sets SO_REUSEADDR
        assert not is_port_free("127.0.0.1", port)
