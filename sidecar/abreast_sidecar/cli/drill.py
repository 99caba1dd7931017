"""`abreast drill`: a fire drill. One part is broken while users come; what they saw of it, and what the ledger lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from abreast_sidecar.cli import tables
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import count
from abreast_sidecar.cli.parameters import SHARE
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast_demo.noticed import Report

NAMES = ("new-killed", "new-hangs", "new-errors", "sidecar-killed", "redis-down", "postgres-down")
PARTS = {"fastapi", "httpx", "pydantic"}


@click.command()
@click.argument("names", metavar="[DRILL]...", nargs=-1, type=click.Choice(NAMES))
@click.option("--all", "every", is_flag=True, help="Run all drills, one after another.")
@click.option(
    "--seconds", type=click.FloatRange(4, 60), default=6.0, show_default=True, help="How long it is broken."
)
@click.option(
    "--rate", type=click.FloatRange(10, 500), default=60.0, show_default=True, help="Requests a second."
)
@click.option(
    "--new",
    "share",
    type=SHARE,
    default=1.0,
    help="Share of users on new before the fault.  [default: 100%]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines; the rest goes to stderr.")
def command(
    names: tuple[str, ...],
    every: bool,
    seconds: float,
    rate: float,
    share: float,
    as_json: bool,
) -> int:
    """Break one part of a parallel run under traffic, and measure what users notice.

    Drills are new-killed, new-hangs, new-errors, sidecar-killed, redis-down and postgres-down. They run against the
    demo's shop in a separate stack on free ports, and touch nothing that already runs. The exit code is 1 if users
    saw an error that they should not have seen, or if new did not come back.
    """
    if every == bool(names):
        raise click.UsageError(f"name a drill ({', '.join(NAMES)}), or say --all")
    if share == 0:
        raise click.UsageError("--new must be more than 0%: a drill begins with users on new")
    try:
        from abreast_demo import drill
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PARTS:
            raise
        raise SettingError("drills need more parts; run: pip install 'abreast[demo]'") from error

    from abreast_sidecar.cli.up import ended_by_signals

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)

    def say(line: str) -> None:
        console.print(f"  {line}")

    options = drill.Options(NAMES if every else names, seconds=seconds, rate=rate, share=share)
    with ended_by_signals():
        reports = drill.drill(options, say=say)
    if as_json:
        print(json.dumps([report.for_machines() for report in reports], indent=2))
    else:
        show(tables.console(), reports)
    return Exit.NO if any(report.trouble for report in reports) else Exit.OK


def show(out: tables.Console, reports: list[Report]) -> None:
    out.print(rows(reports))
    for report in reports:
        if report.trouble:
            out.print(tables.styled(f"{report.drill}: {report.trouble}", "fail"))


def rows(reports: list[Report]) -> Table:
    heads = (
        "requests",
        "errors",
        "errors (unsafe)",
        "longest wait",
        "all on old",
        "new is back",
        "sampled",
        "pending",
        "lost",
    )
    made = tables.table("drill", "", *heads, right=frozenset(heads))
    for one in reports:
        made.add_row(
            one.drill,
            tables.styled("FAIL", "fail") if one.trouble else tables.styled("ok", "ok"),
            count(one.requests),
            count(one.safe_errors),
            count(one.unsafe_errors),
            seconds(one.longest_wait),
            seconds(one.until_old),
            seconds(one.until_new),
            "?" if one.sampled is None else count(one.sampled),
            "?" if one.pending is None else count(one.pending),
            "?" if one.lost is None else count(one.lost),
        )
    return made


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
