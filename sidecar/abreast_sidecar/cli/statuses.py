"""What people say of a finding, on the command line."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import click
from rich.table import Table

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import Calls, Link
from abreast_sidecar.cli.humane import ago, printable
from abreast_sidecar.cli.shift import actor_or_user
from abreast_sidecar.cli.tables import Console, styled
from abreast_sidecar.errors import ArgumentError

WORDS = {
    "confirmed": "Say that it is a regression: it counts, whatever the counts say of noise.",
    "expected": "Say that the change is meant: it counts as explained.",
    "fixed": "Say that it is fixed: it reopens by itself when a later release shows it.",
    "open": "Take back what was said.",
}


def status_name(value: api.FindingStatus.ValueType) -> str:
    return api.FindingStatus.Name(value).removeprefix("FINDING_STATUS_").lower()


def said(
    word: str | None, reason: str, actor: str | None, release: str
) -> api.SetFindingStatusRequest | None:
    """What the options say; None where they only ask. Raise ArgumentError for those that don't fit together."""
    if word is None:
        if reason or actor or release:
            raise ArgumentError("--reason, --actor and --release go with one of --" + ", --".join(WORDS))
        return None
    if not reason.strip():
        raise ArgumentError(f"--{word} needs a --reason, which is kept with the finding")
    status = api.FindingStatus.Value(f"FINDING_STATUS_{word.upper()}")
    return api.SetFindingStatusRequest(
        status=status, reason=reason, actor=actor_or_user(actor), release=release
    )


def say(link: Link, request: api.SetFindingStatusRequest) -> None:
    async def ask(calls: Calls) -> api.SetFindingStatusResponse:
        return await calls.comparison.SetFindingStatus(request, timeout=calls.timeout)

    link.run(ask)


def told(finding: api.Finding, events: Sequence[api.FindingEvent], now: dt.datetime) -> str:
    """The status, and who said so last."""
    name = status_name(finding.status)
    if not events:
        return name
    last = events[0]
    release = f" in release {printable(last.release)}" if last.release else ""
    return f"{name}{release}: {printable(last.reason)} ({printable(last.actor)}, {ago(last.time, now)})"


def history(out: Console, events: Sequence[api.FindingEvent], now: dt.datetime) -> None:
    """What was said before; nothing where that is little."""
    if len(events) < 2:
        return
    made = Table.grid(padding=(0, 2, 0, 0))
    for event in events[1:]:
        release = f" in {printable(event.release)}" if event.release else ""
        made.add_row(
            ago(event.time, now),
            printable(event.actor),
            f"{status_name(event.after)}{release}",
            printable(event.reason),
        )
    out.print(styled("\nsaid before", "bold"))
    out.print(made)


def word_options(command: click.decorators.FC) -> click.decorators.FC:
    for word, line in reversed(WORDS.items()):
        command = click.option(f"--{word}", "word", flag_value=word, help=line)(command)
    return command
