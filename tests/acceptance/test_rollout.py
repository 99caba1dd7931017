"""Guard and ramp around two real services: Envoy, the middleware, Redis, the sidecar and Postgres, under constant load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import is_answering
from abreast_sidecar.stack.stack import ANY_PORT_ADDRESS, Stack
from support import eventually, eventually_async, free_ports
from support_users import Users, users

SERVICE = Path(__file__).parents[1] / "small_service.py"
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
LENIENT = ("--max-mismatch", "10%", "--max-error", "10%", "--max-slower", "900%", "--min-completeness", "80%")


def start(name: str, port: int, stack: Stack, opening: ExitStack) -> subprocess.Popen[bytes]:
    """`name` is what it says it is: answers of `old` and `new` differ only where a test says so."""
    environment = {"ABREAST_REDIS_URL": stack.redis_url, "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([sys.executable, SERVICE, name, str(port)], env=environment)
    opening.callback(process.wait)
    opening.callback(process.kill)
    eventually(lambda: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"), description=f"{name} answers")
    return process


@pytest.fixture
def stack() -> Iterator[Stack]:
    old, new = (SocketAddress("127.0.0.1", port) for port in free_ports(2))
    settings = EnvoySettings(
        service="shop", listen=ANY_PORT_ADDRESS, old=(old,), new=(new,), sample_safe=1.0, baseline_share=0.1
    )
    with Stack(settings) as stack:
        yield stack


@pytest.fixture
async def load(stack: Stack) -> AsyncIterator[Users]:
    async with users(stack.envoy_settings.listen.port, readers=4, writers=0, paths=("/products/{}",)) as load:
        yield load


def abreast(stack: Stack, *words: str) -> Any:
    """As a user types it; what it prints as JSON."""
    command = [sys.executable, "-m", "abreast_sidecar", *words, "--json"]
    process = subprocess.run(
        command, env={**os.environ, "ABREAST_SIDECAR": stack.grpc_address}, capture_output=True, check=False
    )
    assert process.returncode == 0, process.stderr.decode()
    return json.loads(process.stdout)


def state(stack: Stack) -> tuple[str, int, int]:
    """Return state and step of the last ramp, and the share of users on new in hundredths of a percent."""
    with psycopg.connect(stack.postgres_url) as ledger:
        query = "select state, step, new_share from abreast.ramp join abreast.traffic using (service) order by id desc"
        (row, *_) = ledger.execute(query).fetchall()
    return row[0], row[1], row[2]


async def test_ramp_climbs_on_real_traffic_and_guard_rolls_back_a_failing_new(stack: Stack, load: Users) -> None:
    with ExitStack() as opening:
        old, new = (addresses[0].port for addresses in (stack.envoy_settings.old, stack.envoy_settings.new))
        start("old", old, stack, opening)
        process = start("old", new, stack, opening)  # an equal version
        await eventually_async(partial(captured, stack), description="pairs are compared")

        steps = ("--steps", "25,100", "--hold", "1s", "--min-pairs", "50")
        begun = abreast(stack, "ramp", "start", *steps, *LENIENT, "--reason", "release 2")
        assert begun["ramp"]["state"]["phase"] == "RAMP_PHASE_PROGRESSING"
        await eventually_async(
            partial(is_in, stack, ("succeeded", 1, 10_000)), within=60, description="all steps are done"
        )
        abreast(stack, "guard", "set", "--mode", "acting", "--reason", "watch it")
        await load.wait_for(50)

        process.send_signal(signal.SIGUSR1)
        await eventually_async(partial(is_in, stack, ("succeeded", 1, 0)), description="the guard rolls back")
        await load.wait_for(20)  # on their way
        after = await load.wait_for(200)

    assert {response.version for response in after} == {"old"}
    assert not [response for response in after if response.trouble]
    events = abreast(stack, "traffic", "events")["events"]
    assert [(event["action"], event["actor"]) for event in events][:2] == [
        ("rollback", "guard"),
        ("guard_set", events[1]["actor"]),
    ]
    assert events[0]["reason"].startswith(("errors: new failed ", "mismatches: "))  # a 500 is both
    assert [event["action"] for event in events[2:]] == ["ramp_succeed", "ramp_step", "ramp_start", "create"]


async def captured(stack: Stack) -> bool:
    with psycopg.connect(stack.postgres_url) as ledger:
        query = "select count(*) from abreast.pair where outcome = 'match'"
        (row,) = ledger.execute(query).fetchall()
    return int(row[0]) > 100


async def is_in(stack: Stack, expected: tuple[str, int, int]) -> bool:
    return state(stack) == expected
