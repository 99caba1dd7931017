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
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import duration, percent, printable
from abreast_sidecar.cli.tables import Console, console, styled, table

SHARES = {
    "new_share": "users on new",
    "sample_safe": "GET, HEAD, OPTIONS mirrored",
    "sample_unsafe": "other methods mirrored",
    "baseline_share": "baseline (of the mirrored)",
}

reason_option = click.option("--reason", required=True, help="Why, for the record.")
actor_option = click.option("--actor", default=None, help="Who, for the record.  [default: user@host]")


class Changed(Protocol):
    """GetTrafficResponse, UpdateTrafficResponse, RollbackResponse and PromoteResponse alike."""

    @property
    def traffic(self) -> api.Traffic: ...
    @property
    def envoys(self) -> Iterable[api.EnvoyState]: ...
    @property
    def others_unknown(self) -> str: ...


def actor_or_user(actor: str | None) -> str:
    if actor is not None:
        return actor
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def report(before: api.Traffic, changed: Changed, *, as_json: bool, not_recorded: str = "") -> Exit:
    """Print what changed. Exit.NO where an Envoy or the ledger does not have it, or where that is not known."""
    if as_json:
        assert isinstance(changed, Message)
        print_json(changed)
    else:
        out = console()
        out.print(changes(before, changed.traffic))
        out.print()
        show_envoys(out, changed)
    if not_recorded:
        click.echo(f"abreast: in force, but {not_recorded}", err=True)
    missing = without(changed)
    if missing:
        click.echo(f"abreast: {'' if not_recorded else 'the change is stored, but '}{missing}", err=True)
    return Exit.NO if not_recorded or missing else Exit.OK


def without(changed: Changed) -> str:
    """Who does not have it; empty where all have."""
    envoys = list(changed.envoys)
    missing = [envoy for envoy in envoys if not has_it(envoy, changed.traffic)]
    if missing:
        return f"{len(missing)} of {len(envoys)} Envoys do not have it yet"
    if changed.others_unknown:
        return "whether Envoys of other sidecars have it is not known"
    return "" if envoys else "no Envoy is connected"


def has_it(envoy: api.EnvoyState, traffic: api.Traffic) -> bool:
    return envoy.acknowledged_version >= traffic.version and not envoy.error


def changes(before: api.Traffic, after: api.Traffic) -> Table:
    made = table(printable(after.service), "before", "after", right=frozenset({"before", "after"}))
    for field, name in SHARES.items():
        was, now = percent(getattr(before, field)), percent(getattr(after, field))
        made.add_row(name, was, styled(now, "bold" if was != now else "dim"))
    return made


def show_envoys(out: Console, found: Changed) -> None:
    envoys, traffic = list(found.envoys), found.traffic
    if envoys:
        out.print(_rows(envoys, traffic))
    else:
        out.print(styled("no Envoy is connected (abreast doctor)", "warn"))
    if found.others_unknown:
        out.print(
            styled(f"Envoys of other sidecars are not known: {printable(found.others_unknown)}", "warn")
        )


def _rows(envoys: Sequence[api.EnvoyState], traffic: api.Traffic) -> Table:
    several = len({envoy.sidecar for envoy in envoys}) > 1
    made = table(
        "Envoy", *(["sidecar"] if several else []), "has the settings", "after", right=frozenset({"after"})
    )
    shared = Counter(envoy.node for envoy in envoys)
    for envoy in envoys:
        if envoy.error:
            state = styled(f"refused: {envoy.error}", "fail")
        elif has_it(envoy, traffic):
            state = styled("yes", "ok")
        else:
            state = styled(f"not yet (has version {envoy.acknowledged_version} of {traffic.version})", "warn")
        after = duration(envoy.acknowledged_after) if envoy.HasField("acknowledged_after") else ""
        node = f"{envoy.node} ({envoy.peer})" if shared[envoy.node] > 1 else envoy.node
        made.add_row(printable(node), *([printable(envoy.sidecar)] if several else []), state, after)
    return made
