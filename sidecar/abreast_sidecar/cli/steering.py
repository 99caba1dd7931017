"""Guard and ramp in a line each, for commands that are about more."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import grpc.aio
from rich.text import Text

from abreast.v1 import steering_pb2 as api
from abreast_sidecar.cli.connection import Calls
from abreast_sidecar.cli.guard import format_guard_line
from abreast_sidecar.cli.ramp import format_ramp_line


@dataclass(frozen=True)
class RolloutStatus:
    guard: api.Guard
    ramp: api.Ramp | None


async def fetch_rollout_status(calls: Calls, service: str) -> RolloutStatus | None:
    """None where the sidecar is older than this command."""
    try:
        return await _fetch_rollout_status(calls, service)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        return None


async def _fetch_rollout_status(calls: Calls, service: str) -> RolloutStatus:
    guard = await calls.steering.GetGuard(api.GetGuardRequest(service=service), timeout=calls.timeout_s)
    ramp = await calls.steering.GetRamp(api.GetRampRequest(service=service), timeout=calls.timeout_s)
    return RolloutStatus(guard.guard, ramp.ramp if ramp.HasField("ramp") else None)


def format_rollout_lines(rollout: RolloutStatus | None, current_time: dt.datetime) -> list[Text]:
    if rollout is None:
        return []
    ramp = [format_ramp_line(rollout.ramp)] if rollout.ramp else []
    return [*ramp, format_guard_line(rollout.guard, current_time)]
