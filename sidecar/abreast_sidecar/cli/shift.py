"""What a change of traffic looks like: before, after, and which Envoys have it."""

from __future__ import annotations

import getpass
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import click
from google.protobuf.message import Message
from rich.table import Table

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.connection import print_json
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.humane import format_duration, format_percent, to_printable
from abreast_sidecar.cli.tables import Console, make_console, make_table, style_text

TRAFFIC_SHARE_LABELS = {
    "new_share": "users on new",
    "sample_safe": "GET, HEAD, OPTIONS mirrored",
    "sample_unsafe": "other methods mirrored",
    "baseline_share": "baseline (of the mirrored)",
}

reason_option = click.option("--reason", required=True, help="Why, for the record.")
actor_option = click.option("--actor", default=None, help="Who, for the record.  [default: user@host]")


class TrafficChange(Protocol):
    """GetTrafficResponse, UpdateTrafficResponse, RollbackResponse and PromoteResponse alike."""

    @property
    def traffic(self) -> api.Traffic: ...
    @property
    def envoys(self) -> Iterable[api.EnvoyState]: ...
    @property
    def others_unknown(self) -> str: ...


def default_actor(actor: str | None) -> str:
    if actor is not None:
        return actor
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def print_traffic_change(
    before: api.Traffic, change: TrafficChange, *, as_json: bool, not_recorded: str = ""
) -> ExitCode:
    """Print what changed. Exit.NO where an Envoy or the ledger does not have it, or where that is not known."""
    if as_json:
        assert isinstance(change, Message)
        print_json(change)
    else:
        out = make_console()
        out.print(build_traffic_change_table(before, change.traffic))
        out.print()
        print_envoys(out, change)
    if not_recorded:
        click.echo(f"abreast: in force, but {not_recorded}", err=True)
    missing_text = describe_missing_envoys(change)
    if missing_text:
        click.echo(f"abreast: {'' if not_recorded else 'the change is stored, but '}{missing_text}", err=True)
    return ExitCode.CHECK_FAILED if not_recorded or missing_text else ExitCode.OK


def describe_missing_envoys(change: TrafficChange) -> str:
    """Who does not have it; empty where all have."""
    envoys = list(change.envoys)
    missing_envoys = [envoy for envoy in envoys if not has_acknowledged(envoy, change.traffic)]
    if missing_envoys:
        return f"{len(missing_envoys)} of {len(envoys)} Envoys do not have it yet"
    if change.others_unknown:
        return "whether Envoys of other sidecars have it is not known"
    return "" if envoys else "no Envoy is connected"


def has_acknowledged(envoy: api.EnvoyState, traffic: api.Traffic) -> bool:
    return envoy.acknowledged_version >= traffic.version and not envoy.error


def build_traffic_change_table(before: api.Traffic, after: api.Traffic) -> Table:
    table = make_table(
        to_printable(after.service), "before", "after", numeric_columns=frozenset({"before", "after"})
    )
    for field, name in TRAFFIC_SHARE_LABELS.items():
        value_before, value_after = (
            format_percent(getattr(before, field)),
            format_percent(getattr(after, field)),
        )
        table.add_row(
            name, value_before, style_text(value_after, "bold" if value_before != value_after else "dim")
        )
    return table


def print_envoys(out: Console, change: TrafficChange) -> None:
    envoys, traffic = list(change.envoys), change.traffic
    if envoys:
        out.print(_build_envoys_table(envoys, traffic))
    else:
        out.print(style_text("no Envoy is connected (abreast doctor)", "warn"))
    if change.others_unknown:
        out.print(
            style_text(
                f"Envoys of other sidecars are not known: {to_printable(change.others_unknown)}", "warn"
            )
        )


def _build_envoys_table(envoys: Sequence[api.EnvoyState], traffic: api.Traffic) -> Table:
    has_several_sidecars = len({envoy.sidecar for envoy in envoys}) > 1
    table = make_table(
        "Envoy",
        *(["sidecar"] if has_several_sidecars else []),
        "has the settings",
        "after",
        numeric_columns=frozenset({"after"}),
    )
    node_counts = Counter(envoy.node for envoy in envoys)
    for envoy in envoys:
        if envoy.error:
            state = style_text(f"refused: {envoy.error}", "fail")
        elif has_acknowledged(envoy, traffic):
            state = style_text("yes", "ok")
        else:
            state = style_text(
                f"not yet (has version {envoy.acknowledged_version} of {traffic.version})", "warn"
            )
        delay_text = format_duration(envoy.acknowledged_after) if envoy.HasField("acknowledged_after") else ""
        node = f"{envoy.node} ({envoy.peer})" if node_counts[envoy.node] > 1 else envoy.node
        table.add_row(
            to_printable(node),
            *([to_printable(envoy.sidecar)] if has_several_sidecars else []),
            state,
            delay_text,
        )
    return table
