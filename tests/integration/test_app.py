"""The sidecar as a process: signals, worker processes, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import grpc
import psycopg
import pytest
import redis
from click.testing import CliRunner, Result
from msgspec.structs import replace

from abreast.protocol.join import JOIN_SCRIPT, SERVICES_KEY, Keys, Limits, join_arguments
from abreast.v1 import comparison_pb2, comparison_pb2_grpc
from abreast_sidecar.cli import abreast
from support import eventually, find_free_port, free_ports
from support_captures import capture, encode


@dataclass
class Process:
    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int
    log: list[dict[str, Any]] = field(default_factory=list)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            with urlopen(f"http://127.0.0.1:{self.http_port}/readyz", timeout=10) as answer:
                return bool(answer.status == 200)
        except (HTTPError, URLError, ConnectionError):
            return False

    def list_events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line.get("event") == event]

    def end(self, name: signal.Signals = signal.SIGTERM, timeout: float = 20) -> int:
        self.process.send_signal(name)
        return self.process.wait(timeout)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "abreast_sidecar", *arguments]


@contextmanager
def started(redis_url: str, postgres_url: str, *options: str, ready: bool = True) -> Iterator[Process]:
    grpc_port, http_port = free_ports(2)
    environment = {
        **os.environ,
        "ABREAST_REDIS_URL": redis_url,
        "ABREAST_POSTGRES_URL": postgres_url,
        "ABREAST_GRPC_LISTEN": f"127.0.0.1:{grpc_port}",
        "ABREAST_HTTP_LISTEN": f"127.0.0.1:{http_port}",
        "ABREAST_COLLECTOR_LISTEN": "127.0.0.1:0",
        "ABREAST_SHUTDOWN_TIMEOUT": "6",
    }
    process = subprocess.Popen(command("sidecar", *options), stderr=subprocess.PIPE, env=environment)
    sidecar = Process(process, grpc_port, http_port)
    reading = threading.Thread(target=_read, args=(process, sidecar.log))
    reading.start()
    try:
        if ready:
            eventually(sidecar.ready, description="the sidecar is ready")
        yield sidecar
    finally:
        process.kill()
        process.wait()
        reading.join()
        assert process.stderr is not None
        process.stderr.close()


def _read(process: subprocess.Popen[bytes], log: list[dict[str, Any]]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        try:
            log.append(json.loads(line))
        except json.JSONDecodeError:
            log.append({"event": line.decode(errors="replace")})


def send(redis_url: str, count: int) -> list[str]:
    """Add pairs to Redis like the middleware, and return their ids."""
    keys = Keys("shop", 0)
    pairs = [str(uuid.uuid4()) for _ in range(count)]
    with redis.Redis.from_url(redis_url) as client:
        client.hset(SERVICES_KEY, "shop", "1")
        for pair in pairs:
            captures = capture("old", {"n": 1}), capture("new", {"n": 1}, role="shadow")
            sides = [replace(side, pair=pair) for side in captures]
            batch = [(pair, side.slot, 2, encode(side)) for side in sides]
            names, arguments = join_arguments(keys, Limits(), batch)
            client.eval(JOIN_SCRIPT, len(names), *names, *arguments)
    return pairs


def read_pair_ids(postgres_url: str) -> set[str]:
    with psycopg.connect(postgres_url) as connection:
        return {row[0] for row in connection.execute("select id from abreast.pair")}


def test_sigterm_commits_pairs_ends_streams_and_exits_with_0(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url) as sidecar:
        pairs = send(redis_url, 50)
        eventually(lambda: read_pair_ids(postgres_url) == set(pairs), description="all pairs are in the ledger")
        with grpc.insecure_channel(f"127.0.0.1:{sidecar.grpc_port}") as channel:
            stub: Any = comparison_pb2_grpc.ComparisonServiceStub(channel)  # type: ignore[arg-type]  # typed for aio only
            watch = stub.WatchFindings(comparison_pb2.WatchFindingsRequest())
            watch.initial_metadata()
            code = sidecar.end()
            with pytest.raises(grpc.RpcError) as error:
                next(watch)

    assert code == 0
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert sidecar.list_events("draining")
    assert sidecar.list_events("sidecar stopped")
    assert not [line for line in sidecar.log if line.get("level") == "error"]


def test_sigint_drains(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url) as sidecar:
        assert sidecar.end(signal.SIGINT) == 0
    assert sidecar.list_events("sidecar stopped")


def test_sigterm_without_postgres_ends_in_time(redis_url: str) -> None:
    nowhere = f"postgresql://127.0.0.1:{find_free_port()}/abreast"
    with started(redis_url, nowhere, ready=False) as sidecar:
        eventually(
            lambda: bool(sidecar.list_events("waiting for postgres")), description="the log says what is waited for"
        )
        assert not sidecar.ready()

        assert sidecar.end(timeout=10) == 0


def test_logs_are_json_with_level_and_time(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url, "--log-level", "debug") as sidecar:
        sidecar.end()

    assert all({"event", "level", "timestamp"} <= line.keys() for line in sidecar.log)


def list_worker_pids(sidecar: Process) -> list[int]:
    return [line["pid"] for line in sidecar.list_events("a worker process started")]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123  # a kernel's file
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_worker_processes_compare_pairs_and_end_with_the_sidecar(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url, "--workers", "2") as sidecar:
        pairs = send(redis_url, 200)
        eventually(lambda: read_pair_ids(postgres_url) == set(pairs), description="all pairs are in the ledger")
        pids = list_worker_pids(sidecar)
        code = sidecar.end()

    assert code == 0
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_killed_worker_process_is_restarted(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url, "--workers", "2") as sidecar:
        first = list_worker_pids(sidecar)
        os.kill(first[0], signal.SIGKILL)
        eventually(lambda: len(list_worker_pids(sidecar)) == 3, description="a new worker process")
        eventually(sidecar.ready, description="the sidecar is ready again")
        pairs = send(redis_url, 20)
        eventually(lambda: read_pair_ids(postgres_url) == set(pairs), description="all pairs are in the ledger")

    (event,) = sidecar.list_events("a worker process ended")
    assert (event["pid"], event["code"]) == (first[0], -signal.SIGKILL)


def test_stuck_worker_process_makes_sidecar_not_ready(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url, "--workers", "1") as sidecar:
        (pid,) = list_worker_pids(sidecar)
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: not sidecar.ready(), description="the stuck worker is noticed")
        os.kill(pid, signal.SIGCONT)
        eventually(sidecar.ready, description="the sidecar is ready again")


def test_worker_processes_end_with_killed_sidecar(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url, "--workers", "2") as sidecar:
        pids = list_worker_pids(sidecar)
        sidecar.end(signal.SIGKILL)
        eventually(lambda: not [pid for pid in pids if is_alive(pid)], description="the worker processes are gone")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"ABREAST_COLLECTOR_LISTEN": "127.0.0.1:0", **environment}
    return subprocess.run(
        command(*arguments), env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def invoke(*arguments: str, **environment: str) -> Result:
    """Run a command that ends in this process. A new process costs 2 s of CPU."""
    return CliRunner().invoke(abreast, arguments, env=environment)


def test_port_in_use_prints_one_line(redis_url: str, postgres_url: str) -> None:
    with started(redis_url, postgres_url) as sidecar:
        for option, port in (("--grpc-listen", sidecar.grpc_port), ("--http-listen", sidecar.http_port)):
            addresses = dict(zip(("--grpc-listen", "--http-listen"), free_ports(2), strict=True)) | {option: port}
            options = [part for name, number in addresses.items() for part in (name, f"127.0.0.1:{number}")]
            process = run("sidecar", "--redis-url", redis_url, "--postgres-url", postgres_url, *options)

            assert process.returncode == 3
            (line,) = [text for text in process.stderr.splitlines() if not text.startswith("{")]
            assert line.startswith(f"abreast: can't listen on 127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ABREAST_WORKERS",
            "many",
            "abreast: ABREAST_WORKERS must be a whole number of processes, 0 or more, got 'many'",
        ),
        (
            "ABREAST_LOG_LEVEL",
            "loud",
            "abreast: ABREAST_LOG_LEVEL must be one of debug, info, warning, error, got 'loud'",
        ),
    ],
)
def test_invalid_setting_prints_one_line_and_exits_with_2(name: str, value: str, message: str) -> None:
    result = invoke("sidecar", **{name: value})

    assert (result.exit_code, result.stderr.strip()) == (2, message)


def test_invalid_option_error_names_the_option() -> None:
    result = invoke("sidecar", "--sample-safe", "120%")

    assert result.exit_code == 2
    assert "--sample-safe" in result.stderr
    assert "from 0% to 100%" in result.stderr


def test_migrate_prints_version_and_is_repeatable(empty_postgres_url: str) -> None:
    for result in (
        invoke("migrate", "--postgres-url", empty_postgres_url),
        invoke("migrate", ABREAST_POSTGRES_URL=empty_postgres_url),
    ):
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("the ledger has schema version ")


def test_sidecar_refuses_newer_ledger(redis_url: str, postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("insert into abreast.schema_version (version, name, digest) values (9999, 'future', '')")

    addresses = ("--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0")
    process = run("sidecar", "--redis-url", redis_url, "--postgres-url", postgres_url, *addresses)

    assert process.returncode == 3
    (line,) = [text for text in process.stderr.splitlines() if not text.startswith("{")]
    assert "has schema version 9999" in line


def test_sidecar_refuses_ledger_of_old_code(redis_url: str, empty_postgres_url: str) -> None:
    with psycopg.connect(empty_postgres_url) as connection:
        connection.execute("create schema abreast; create table abreast.migration (version integer)")

    addresses = ("--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0")
    for process in (
        run("migrate", "--postgres-url", empty_postgres_url),
        run("sidecar", "--redis-url", redis_url, "--postgres-url", empty_postgres_url, *addresses),
    ):
        assert process.returncode == 3
        (line,) = [text for text in process.stderr.splitlines() if not text.startswith("{")]
        assert "can't upgrade: create a new database" in line
