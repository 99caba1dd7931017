"""`abreast rollback`: all users get the old version."""

from __future__ import annotations

import click

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.connection import SidecarClient, connection_options, json_option, service_option
from abreast_sidecar.cli.shift import actor_option, default_actor, print_traffic_change
from abreast_sidecar.embedded.record import find_run
from abreast_sidecar.errors import ServerError

MANUAL_ROLLBACK_COMMAND = (
    "curl -X POST 'http://{}/runtime_modify?abreast.weight.old=10000&abreast.weight.new_or_old=0'"
)
ADMIN_PLACEHOLDER = "ENVOYS_ADMIN_ADDRESS"


@click.command()
@click.option(
    "--reason", default="", help="Why, for the record; may be given, need not: nothing is to hold this up."
)
@actor_option
@service_option
@json_option
@connection_options
def rollback_command(link: SidecarClient, reason: str, actor: str | None, service: str, as_json: bool) -> int:
    """Send all users to the old version, at once, until promote or traffic set.

    Exits with 1 where an Envoy does not have it yet, or the ledger does not know of it yet.
    """
    request = api.RollbackRequest(service=service, actor=default_actor(actor), reason=reason)
    try:
        change = link.call(lambda calls: calls.traffic.Rollback(request, timeout=calls.timeout_s))
    except ServerError as error:
        admin = find_run(link.address).get("ABREAST_ENVOY_ADMIN", ADMIN_PLACEHOLDER).removeprefix("http://")
        raise ServerError(
            f"{error}; or pull the brake in each Envoy: {MANUAL_ROLLBACK_COMMAND.format(admin)}"
        ) from error
    return print_traffic_change(change.previous, change, as_json=as_json, not_recorded=change.not_recorded)
