from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import redis
from support import eventually

from abreast_sidecar.embedded import PostgresServer, RedisServer


def test_postgres_keeps_its_data_over_a_restart(tmp_path_factory: object) -> None:
    folder = Path("/tmp") / f"abreast-test-{os.getpid()}"
    try:
        with PostgresServer(folder) as server, psycopg.connect(server.url()) as connection:
            connection.execute("create table kept (n int)")
            connection.execute("insert into kept values (7)")
        with PostgresServer(folder) as server, psycopg.connect(server.url()) as connection:
            row = connection.execute("select n from kept").fetchone()

        assert row == (7,)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_postgres_wants_a_password_on_loopback(postgres_server: PostgresServer) -> None:
    wrong = postgres_server.url().replace(postgres_server.password, "wrong")
    try:
        psycopg.connect(wrong, connect_timeout=5).close()
    except psycopg.OperationalError as error:
        assert "password authentication failed" in str(error)
    else:
        raise AssertionError("connected with a wrong password")


def test_servers_die_with_the_process_that_started_them() -> None:
    program = (
        "import sys, time; from abreast_sidecar.embedded import *\n"
        "r = RedisServer().start(); p = PostgresServer().start()\n"
        "print(r.server.pid, p.server.pid, flush=True); time.sleep(600)"
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
