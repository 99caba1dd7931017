"""`abreast drill`: a fire drill. One part is broken while users come; what they saw of it, and what the ledger lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from abreast_sidecar.cli import tables
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.humane import format_count
from abreast_sidecar.cli.parameters import SHARE_TYPE
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast_demo.noticed import DrillReport

DRILL_NAMES = ("new-killed", "new-hangs", "new-errors", "sidecar-killed", "redis-down", "postgres-down")
DRILL_PACKAGES = {"fastapi", "httpx", "pydantic"}


@click.command()
@click.argument("names", metavar="[DRILL]...", nargs=-1, type=click.Choice(DRILL_NAMES))
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
    type=SHARE_TYPE,
    default=1.0,
    help="Share of users on new before the fault.  [default: 100%]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines; the rest goes to stderr.")
def drill_command(
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
        raise click.UsageError(f"name a drill ({', '.join(DRILL_NAMES)}), or say --all")
    if share == 0:
        raise click.UsageError("--new must be more than 0%: a drill begins with users on new")
    try:
        from abreast_demo import drill
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DRILL_PACKAGES:
            raise
        raise SettingError("drills need more parts; run: pip install 'abreast[demo]'") from error

    from abreast_sidecar.cli.up import signals_as_interrupts

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)

    def print_message(line: str) -> None:
        console.print(f"  {line}")

    options = drill.DrillOptions(
        DRILL_NAMES if every else names, fault_duration_s=seconds, requests_per_s=rate, new_share=share
    )
    with signals_as_interrupts():
        reports = drill.run_drills(options, on_message=print_message)
    if as_json:
        print(json.dumps([report.to_json_object() for report in reports], indent=2))
    else:
        print_drill_reports(tables.make_console(), reports)
    return ExitCode.CHECK_FAILED if any(report.trouble for report in reports) else ExitCode.OK


def print_drill_reports(out: tables.Console, reports: list[DrillReport]) -> None:
    out.print(build_drill_table(reports))
    for report in reports:
        if report.trouble:
            out.print(tables.style_text(f"{report.drill}: {report.trouble}", "fail"))


def build_drill_table(reports: list[DrillReport]) -> Table:
    columns = (
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
    table = tables.make_table("drill", "", *columns, numeric_columns=frozenset(columns))
    for report in reports:
        table.add_row(
            report.drill,
            tables.style_text("FAIL", "fail") if report.trouble else tables.style_text("ok", "ok"),
            format_count(report.requests),
            format_count(report.safe_errors),
            format_count(report.unsafe_errors),
            format_drill_time(report.longest_wait),
            format_drill_time(report.until_old),
            format_drill_time(report.until_new),
            "?" if report.sampled is None else format_count(report.sampled),
            "?" if report.pending is None else format_count(report.pending),
            "?" if report.lost is None else format_count(report.lost),
        )
    return table


def format_drill_time(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
