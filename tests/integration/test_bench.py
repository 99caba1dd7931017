"""Benchmarks that are also tests, and what an interrupted one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import eventually

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_benchmark_stops_its_servers(ending: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    bench = subprocess.Popen(
        [sys.executable, BENCH / "pipeline.py", "--quick"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        eventually(lambda: bool(_children(bench.pid)), description="a server was started")
        servers = _children(bench.pid)
        bench.send_signal(ending)
        code = bench.wait(60)
    finally:
        bench.kill()
        bench.wait()

    assert code == (-ending if ending == signal.SIGKILL else 128 + ending)
    eventually(lambda: not any(map(_runs, servers)), description="the servers have ended")


def test_both_ways_of_capture_make_the_same_ledger() -> None:
    command: list[str | Path] = [sys.executable, BENCH / "captures.py", "--requests", "200", "--rate", "40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert result.returncode == 0, result.stdout + result.stderr


def _children(pid: int) -> list[int]:
    names = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [int(name) for name in names if _parent(int(name)) == pid]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
