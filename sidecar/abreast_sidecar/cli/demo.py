"""`abreast drill`: a fire drill. One part is broken while users come; what they saw of it, and what the ledger lost."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import SHARE_TYPE, ParserParamType
from abreast_sidecar.client import output as tables
from abreast_sidecar.client.output import format_count
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast_demo.drill import DrillReport
    from abreast_sidecar.envoy.settings import SocketAddress


DEMO_PACKAGES = {"fastapi", "httpx", "pydantic"}


def _parse_listener(value: str) -> SocketAddress:
    from abreast_sidecar.envoy.settings import parse_listener

    return parse_listener(value)


@click.command()
@click.option("--once", is_flag=True, help="End after the result; exit code 1 if it is not as planted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines; the rest goes to stderr.")
@click.option("--seconds", type=click.FloatRange(5, 600), default=15.0, show_default=True, help="How long users come.")
@click.option("--rate", type=click.FloatRange(20, 2000), default=150.0, show_default=True, help="Requests a second.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed sends the same requests.")
@click.option(
    "--listen",
    type=ParserParamType("[host]:port", _parse_listener),
    help="Where users reach Envoy.  [default: 127.0.0.1:8080, or a free port if that is taken]",
)
def demo_command(
    *, once: bool, as_json: bool, seconds: float, rate: float, seed: int, listen: SocketAddress | None
) -> int:
    """Run a small shop in two versions, send it traffic, and show what differs.

    The new version has planted mistakes; the run says which of them were found. The shop stays open until Ctrl-C.
    """
    try:
        from abreast_demo import console_output as show
        from abreast_demo import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_PACKAGES:
            raise
        raise SettingError("the demo needs more parts; run: pip install 'abreast[demo]'") from error
    from rich.console import Console

    from abreast_sidecar.client import output as tables

    def handle_outcome(at_end: run.DemoOutcome) -> None:
        output.print_outcome(at_end)
        if as_json:
            print(json.dumps(at_end.result.to_json_object(), indent=2), flush=True)
        if not once:
            output.print_message("the shop stays open, with a little traffic, until Ctrl-C")

    stderr_console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    console = stderr_console if as_json else tables.make_console()
    with show.ConsoleOutput(console, show_results=not as_json) as output:
        listener = run.DemoCallbacks(
            on_message=output.print_message,
            on_wait=output.show_wait,
            on_ready=output.print_ready,
            on_step=output.show_step,
            on_progress=output.update_progress,
            on_regression=output.print_regression,
            on_outcome=handle_outcome,
        )
        options = run.DemoOptions(duration_s=seconds, requests_per_s=rate, seed=seed, listen=listen, keep_open=not once)
        result = run.run_demo(options, listener)
    sys.stdout.flush()
    if result is None:
        return ExitCode.INTERRUPTED
    return ExitCode.OK if result.is_as_planted or not once else ExitCode.CHECK_FAILED


DRILL_NAMES = ("new-killed", "new-hangs", "new-errors", "sidecar-killed", "redis-down", "postgres-down")
DRILL_PACKAGES = {"fastapi", "httpx", "pydantic"}


@click.command()
@click.argument("names", metavar="[DRILL]...", nargs=-1, type=click.Choice(DRILL_NAMES))
@click.option("--all", "every", is_flag=True, help="Run all drills, one after another.")
@click.option("--seconds", type=click.FloatRange(4, 60), default=6.0, show_default=True, help="How long it is broken.")
@click.option("--rate", type=click.FloatRange(10, 500), default=60.0, show_default=True, help="Requests a second.")
@click.option(
    "--new", "share", type=SHARE_TYPE, default=1.0, help="Share of users on new before the fault.  [default: 100%]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines; the rest goes to stderr.")
def drill_command(names: tuple[str, ...], every: bool, seconds: float, rate: float, share: float, as_json: bool) -> int:
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
