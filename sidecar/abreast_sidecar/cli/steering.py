"""Guard and ramp in a line each, for commands that are about more."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import grpc.aio
from rich.text import Text

from abreast.v1 import steering_pb2 as api
from abreast_sidecar.cli.connection import Calls
from abreast_sidecar.cli.guard import guard_line
from abreast_sidecar.cli.ramp import ramp_line


@dataclass(frozen=True)
class Steering:
    guard: api.Guard
    ramp: api.Ramp | None


async def ask_steering(calls: Calls, service: str) -> Steering | None:
    """None where the sidecar is older than this command."""
    try:
        return await _asked(calls, service)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        return None


async def _asked(calls: Calls, service: str) -> Steering:
    guard = await calls.steering.GetGuard(api.GetGuardRequest(service=service), timeout=calls.timeout)
    ramp = await calls.steering.GetRamp(api.GetRampRequest(service=service), timeout=calls.timeout)
    return Steering(guard.guard, ramp.ramp if ramp.HasField("ramp") else None)


def steering_lines(found: Steering | None, now: dt.datetime) -> list[Text]:
    if found is None:
        return []
    ramp = [ramp_line(found.ramp)] if found.ramp else []
    return [*ramp, guard_line(found.guard, now)]
