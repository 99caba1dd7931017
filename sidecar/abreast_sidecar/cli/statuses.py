"""What people say of a finding, on the command line."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import click
from rich.table import Table

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import Calls, SidecarClient
from abreast_sidecar.cli.humane import format_age, to_printable
from abreast_sidecar.cli.shift import default_actor
from abreast_sidecar.cli.tables import Console, style_text
from abreast_sidecar.errors import ArgumentError

STATUS_HELP = {
    "confirmed": "Say that it is a regression: it counts, whatever the counts say of noise.",
    "expected": "Say that the change is meant: it counts as explained.",
    "fixed": "Say that it is fixed: it reopens by itself when a later release shows it.",
    "open": "Take back what was said.",
}


def status_name(value: api.FindingStatus.ValueType) -> str:
    return api.FindingStatus.Name(value).removeprefix("FINDING_STATUS_").lower()


def parse_status_options(
    word: str | None, reason: str, actor: str | None, release: str
) -> api.SetFindingStatusRequest | None:
    """What the options say; None where they only ask. Raise ArgumentError for those that don't fit together."""
    if word is None:
        if reason or actor or release:
            raise ArgumentError(
                "--reason, --actor and --release go with one of --" + ", --".join(STATUS_HELP)
            )
        return None
    if not reason.strip():
        raise ArgumentError(f"--{word} needs a --reason, which is kept with the finding")
    status = api.FindingStatus.Value(f"FINDING_STATUS_{word.upper()}")
    return api.SetFindingStatusRequest(
        status=status, reason=reason, actor=default_actor(actor), release=release
    )


def set_status(link: SidecarClient, request: api.SetFindingStatusRequest) -> None:
    async def send_request(calls: Calls) -> api.SetFindingStatusResponse:
        return await calls.comparison.SetFindingStatus(request, timeout=calls.timeout_s)

    link.call(send_request)


def format_status(finding: api.Finding, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> str:
    """The status, and who said so last."""
    name = status_name(finding.status)
    if not events:
        return name
    last_event = events[0]
    release = f" in release {to_printable(last_event.release)}" if last_event.release else ""
    return f"{name}{release}: {to_printable(last_event.reason)} ({to_printable(last_event.actor)}, {format_age(last_event.time, current_time)})"


def print_status_history(out: Console, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> None:
    """What was said before; nothing where that is little."""
    if len(events) < 2:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    for event in events[1:]:
        release = f" in {to_printable(event.release)}" if event.release else ""
        grid.add_row(
            format_age(event.time, current_time),
            to_printable(event.actor),
            f"{status_name(event.after)}{release}",
            to_printable(event.reason),
        )
    out.print(style_text("\nsaid before", "bold"))
    out.print(grid)


def status_options(command: click.decorators.FC) -> click.decorators.FC:
    for word, line in reversed(STATUS_HELP.items()):
        command = click.option(f"--{word}", "word", flag_value=word, help=line)(command)
    return command
