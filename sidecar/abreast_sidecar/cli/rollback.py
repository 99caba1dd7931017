"""`abreast rollback`: all users get the old version."""

from __future__ import annotations

import click

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.connection import Calls, Link, connected, json_option, service_option
from abreast_sidecar.cli.shift import actor_option, actor_or_user, reason_option, report


@click.command()
@reason_option
@actor_option
@service_option
@json_option
@connected
def command(link: Link, reason: str, actor: str | None, service: str, as_json: bool) -> int:
    """Send all users to the old version, at once, until promote or traffic set.

    Exits with 1 where the change is stored and an Envoy does not have it yet.
    """
    request = api.RollbackRequest(service=service, actor=actor_or_user(actor), reason=reason)
    before, changed = link.run(lambda calls: _ask(calls, request))
    return report(before, changed, as_json=as_json)


async def _ask(calls: Calls, request: api.RollbackRequest) -> tuple[api.Traffic, api.RollbackResponse]:
    before = await calls.traffic.GetTraffic(
        api.GetTrafficRequest(service=request.service), timeout=calls.timeout
    )
    return before.traffic, await calls.traffic.Rollback(request, timeout=calls.timeout)
