"""`abreast promote`: all users get the new version."""

from __future__ import annotations

import click

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    SidecarClient,
    connection_options,
    json_option,
    service_option,
)
from abreast_sidecar.cli.shift import actor_option, default_actor, print_traffic_change, reason_option


@click.command()
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def promote_command(link: SidecarClient, reason: str, actor: str | None, service: str, as_json: bool) -> int:
    """Send all users to the new version.

    Exits with 1 where the change is stored and an Envoy does not have it yet.
    """
    request = api.PromoteRequest(service=service, actor=default_actor(actor), reason=reason)
    before, change = link.call(lambda calls: _promote(calls, request))
    return print_traffic_change(before, change, as_json=as_json)


async def _promote(calls: Calls, request: api.PromoteRequest) -> tuple[api.Traffic, api.PromoteResponse]:
    before = await calls.traffic.GetTraffic(
        api.GetTrafficRequest(service=request.service), timeout=calls.timeout_s
    )
    return before.traffic, await calls.traffic.Promote(request, timeout=calls.timeout_s)
