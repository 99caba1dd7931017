"""Helpers that run `abreast up` as a separate process in front of two small services."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
from click.testing import CliRunner

from abreast_sidecar.cli import abreast
from support import eventually, find_free_port

SERVICE = Path(__file__).parent / "small_service.py"
PLAIN_SERVICE = Path(__file__).parent / "plain_service.py"
START = 90.0  # seconds, on a busy machine
PAIR_TIMEOUT = "5"  # seconds; an answer that goes on is captured when four of them are over
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("ABREAST_")}


@dataclass
class Up:
    """A running `abreast up`. Use as a context manager."""

    old: int
    new: int
    options: tuple[str, ...] = ()
    listen: int = field(default_factory=find_free_port)
    grpc: int = field(default_factory=find_free_port)
    http: int = field(default_factory=find_free_port)
    config: Path | None = None  # names the services in place of `old` and `new`
    before: tuple[str, ...] = ()  # words of a command that starts it
    pids: dict[str, int] = field(default_factory=dict)  # by version

    def __post_init__(self) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115  # closed by __exit__
        self.process: subprocess.Popen[str] | None = None

    @property
    def text(self) -> str:
        return Path(self.log.name).read_text()

    @property
    def redis_url(self) -> str:
        match = re.search(r"ABREAST_REDIS_URL=(\S+)", self.text)
        assert match is not None, self.text
        return match[1]

    @property
    def edge_key(self) -> str:
        match = re.search(r"ABREAST_EDGE_KEY=(\S+)", self.text)
        assert match is not None, self.text
        return match[1]

    def start(self) -> subprocess.Popen[str]:
        command = [*self.before, sys.executable, "-m", "abreast_sidecar", "up"]
        if self.config:
            command += ["--config", str(self.config)]
        else:
            command += ["--old", f"http://127.0.0.1:{self.old}", "--new", f"http://127.0.0.1:{self.new}"]
            command += ["--service", "shop"]
        command += ["--listen", f"127.0.0.1:{self.listen}"]
        command += ["--grpc", f"127.0.0.1:{self.grpc}", "--http", f"127.0.0.1:{self.http}", *self.options]
        environment = {**CLEAN, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, text=True)
        return self.process

    def __enter__(self) -> Self:
        process = self.start()
        try:
            eventually(
                lambda: "Ctrl-C" in self.text or process.poll() is not None, within=START, description="abreast up runs"
            )
            assert process.poll() is None, self.text
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop(signal.SIGTERM)
        self.log.close()

    def stop(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=40)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Any `abreast` command, with only the sidecar's address."""
        environment = {**CLEAN, "ABREAST_SIDECAR": f"127.0.0.1:{self.grpc}"}
        return subprocess.run(
            [sys.executable, "-m", "abreast_sidecar", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def json(self, *words: str) -> Any:
        """Run the command in this process, which is faster."""
        environment: dict[str, str | None] = {name: None for name in os.environ if name.startswith("ABREAST_")}
        environment["ABREAST_SIDECAR"] = f"127.0.0.1:{self.grpc}"
        result = CliRunner().invoke(abreast, [*words, "--json"], env=environment)
        assert result.stdout, result.stderr
        return json.loads(result.stdout)

    def failures(self) -> set[tuple[str, str]]:
        checks = self.json("doctor")["checks"]
        return {(check["part"], check["name"]) for check in checks if check["state"] == "fail"}

    def ask(self, path: str = "/products/7") -> dict[str, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.listen}{path}", timeout=10) as answer:
            return dict(answer.headers)

    def watch(self, path: str, lines: int) -> list[bytes]:
        """Return the first lines of an answer that does not end, and leave."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.listen}{path}", timeout=10) as answer:
            return [answer.readline() for _ in range(lines)]

    def healthy(self) -> None:
        """Until Envoy has found both versions."""
        eventually(lambda: not self.failures() & {("Envoy", "old"), ("Envoy", "new")}, description="both are healthy")

    def wait_for_pairs(self, pairs: int) -> None:
        eventually(lambda: int(self.json("status")["summary"]["pairs"]) >= pairs, description=f"{pairs} pairs")


@contextlib.contextmanager
def service(version: str, port: int, redis_url: str, *options: str, edge_key: str = "") -> Iterator[int]:
    """Its process."""
    environment = {**CLEAN, "ABREAST_REDIS_URL": redis_url, "ABREAST_PAIR_TIMEOUT": PAIR_TIMEOUT}
    environment["ABREAST_EDGE_KEY"] = edge_key
    with subprocess.Popen([sys.executable, str(SERVICE), version, str(port), *options], env=environment) as process:
        try:
            eventually(lambda: answers(port), description=f"{version} answers")
            yield process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def plain_service(version: str, port: int, *options: str) -> Iterator[None]:
    with subprocess.Popen([sys.executable, str(PLAIN_SERVICE), version, str(port), *options], env=CLEAN) as process:
        try:
            eventually(lambda: answers(port), description=f"{version} answers")
            yield
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def run_up(*options: str, bare: str = "", with_key: bool = False) -> Iterator[Up]:
    """Everything, with both versions; `bare` names one without the middleware, or is `both`."""
    with Up(find_free_port(), find_free_port(), options) as up, contextlib.ExitStack() as opening:
        for version, port in (("old", up.old), ("new", up.new)):
            words = ["bare"] if bare in {version, "both"} else []
            edge_key = up.edge_key if with_key else ""
            up.pids[version] = opening.enter_context(service(version, port, up.redis_url, *words, edge_key=edge_key))
        up.healthy()
        yield up


def find_sidecar(up: Up) -> int:
    """Return the process that receives captures, or 0."""
    assert up.process is not None
    for process in psutil.Process(up.process.pid).children(recursive=True):
        try:
            if process.cmdline()[2:4] == ["abreast_sidecar", "sidecar"] and process.ppid() == up.process.pid:
                return process.pid
        except psutil.Error:
            continue
    return 0


def kill_sidecar(up: Up) -> None:
    """Kill the process that receives captures, and wait until `abreast up` has started another that answers."""
    killed = find_sidecar(up)
    assert killed, "the sidecar does not run"
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: find_sidecar(up) not in {0, killed}, description="the sidecar runs again")
    eventually(lambda: up.command("status").returncode == 0, description="the sidecar answers")
