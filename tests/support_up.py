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

from click.testing import CliRunner

from abreast_sidecar.cli import abreast
from abreast_sidecar.stack.process import find_free_port
from support import eventually

SERVICE = Path(__file__).parent / "small_service.py"
START = 90.0  # seconds, on a busy machine
PAIR_TIMEOUT = "5"  # seconds; an answer that goes on is captured when four of them are over
TAKEN: set[int] = set()  # in this process: no port is given twice
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("ABREAST_")}


def free_port() -> int:
    while (port := find_free_port()) in TAKEN:
        continue
    TAKEN.add(port)
    return port


@dataclass
class Up:
    """A running `abreast up`. Use as a context manager."""

    old: int
    new: int
    options: tuple[str, ...] = ()
    listen: int = field(default_factory=free_port)
    grpc: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)
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
        found = re.search(r"ABREAST_REDIS_URL=(\S+)", self.text)
        assert found is not None, self.text
        return found[1]

    def start(self) -> subprocess.Popen[str]:
        command = [*self.before, sys.executable, "-m", "abreast_sidecar", "up"]
        command += ["--old", f"http://127.0.0.1:{self.old}", "--new", f"http://127.0.0.1:{self.new}"]
        command += ["--service", "shop", "--listen", f"127.0.0.1:{self.listen}"]
        command += ["--grpc", f"127.0.0.1:{self.grpc}", "--http", f"127.0.0.1:{self.http}", *self.options]
        environment = {**CLEAN, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, text=True)
        return self.process

    def __enter__(self) -> Self:
        process = self.start()
        eventually(lambda: "Ctrl-C" in self.text or process.poll() is not None, within=START, what="abreast up runs")
        assert process.poll() is None, self.text
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
        done = CliRunner().invoke(abreast, [*words, "--json"], env=environment)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

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
        eventually(lambda: not self.failures() & {("Envoy", "old"), ("Envoy", "new")}, what="both are healthy")

    def compared(self, pairs: int) -> None:
        eventually(lambda: int(self.json("status")["summary"]["pairs"]) >= pairs, what=f"{pairs} pairs")


@contextlib.contextmanager
def service(version: str, port: int, redis_url: str, *options: str) -> Iterator[int]:
    """Its process."""
    environment = {**CLEAN, "ABREAST_REDIS_URL": redis_url, "ABREAST_PAIR_TIMEOUT": PAIR_TIMEOUT}
    with subprocess.Popen([sys.executable, str(SERVICE), version, str(port), *options], env=environment) as process:
        try:
            eventually(lambda: answers(port), what=f"{version} answers")
            yield process.pid
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def running(*options: str, bare: str = "") -> Iterator[Up]:
    """Everything, with both versions; `bare` names one without the middleware."""
    with Up(free_port(), free_port(), options) as up, contextlib.ExitStack() as opening:
        for version, port in (("old", up.old), ("new", up.new)):
            words = ["bare"] if version == bare else []
            up.pids[version] = opening.enter_context(service(version, port, up.redis_url, *words))
        up.healthy()
        yield up
