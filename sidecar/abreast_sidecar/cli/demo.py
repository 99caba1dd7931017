"""`abreast demo` and `abreast faults`: a shop in two versions, and faults in a stack of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import SHARE_TYPE, ParserParamType
from abreast_sidecar.client.output import format_count, make_console, make_table, style_text
from abreast_sidecar.envoy.settings import SocketAddress, parse_listener
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast_demo.drill import DrillReport

DEMO_PACKAGES = {"fastapi", "httpx", "pydantic"}
DRILL_NAMES = ("new-killed", "new-hangs", "new-errors", "sidecar-killed", "redis-down", "postgres-down")


@click.command()
@click.option("--once", is_flag=True, help="Exit after the result, with 1 if the findings are not the planted ones.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object for scripts, and all other output on stderr."
)
@click.option(
    "--seconds", type=click.FloatRange(5, 600), default=15.0, show_default=True, help="Duration of the traffic."
)
@click.option("--rate", type=click.FloatRange(20, 2000), default=150.0, show_default=True, help="Requests per second.")
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Seed of the traffic: the same seed sends the same requests."
)
@click.option(
    "--listen",
    type=ParserParamType("[host]:port", parse_listener),
    help="Address for users' requests.  [default: 127.0.0.1:8080, or a free port if it is taken]",
)
def demo_command(
    *, once: bool, as_json: bool, seconds: float, rate: float, seed: int, listen: SocketAddress | None
) -> int:
    """Run a small shop in two versions, send traffic to it, and show the differences.

    The new version contains planted regressions, and the output lists those that were found. The shop keeps running
    until Ctrl-C.
    """
    with _demo_packages():
        from abreast_demo import run

    def handle_outcome(outcome: run.DemoOutcome) -> None:
        output.print_outcome(outcome)
        if as_json:
            print(json.dumps(outcome.result.to_json_object(), indent=2), flush=True)
        if not once:
            output.print_message("the shop keeps running, with a little traffic, until Ctrl-C")

    console = _make_stderr_console() if as_json else make_console()
    options = run.DemoOptions(duration_s=seconds, requests_per_s=rate, seed=seed, listen=listen, keep_open=not once)
    with run.ConsoleOutput(console, show_results=not as_json) as output:
        result = run.run_demo(options, output, handle_outcome)
    sys.stdout.flush()
    if result is None:
        return ExitCode.INTERRUPTED
    return ExitCode.OK if result.is_as_planted or not once else ExitCode.CHECK_FAILED


@contextlib.contextmanager
def _demo_packages() -> Iterator[None]:
    """Raise SettingError with the command that installs a missing package of the demo."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_PACKAGES:
            raise
        raise SettingError("demo and faults need more packages; run: pip install 'abreast[demo]'") from error


def _make_stderr_console() -> Console:
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


@click.command()
@click.argument("names", metavar="[DRILL]...", nargs=-1, type=click.Choice(DRILL_NAMES))
@click.option("--all", "every", is_flag=True, help="Run all drills, one after another.")
@click.option("--seconds", type=click.FloatRange(4, 60), default=6.0, show_default=True, help="Duration of the fault.")
@click.option("--rate", type=click.FloatRange(10, 500), default=60.0, show_default=True, help="Requests per second.")
@click.option(
    "--new", "share", type=SHARE_TYPE, default=1.0, help="Share of users on new before the fault.  [default: 100%]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts, and all other output on stderr.")
def faults_command(
    names: tuple[str, ...], every: bool, seconds: float, rate: float, share: float, as_json: bool
) -> int:
    """Break one part of a parallel run under traffic, and measure what users notice.

    Drills are new-killed, new-hangs, new-errors, sidecar-killed, redis-down and postgres-down. They run against the
    demo's shop in a separate stack on free ports, and touch nothing that already runs. The exit code is 1 if users
    saw an error that they should not have seen, or if new did not come back.
    """
    if every == bool(names):
        raise click.UsageError(f"name a drill ({', '.join(DRILL_NAMES)}), or pass --all")
    if share == 0:
        raise click.UsageError("--new must be more than 0%: a drill needs users on new")
    with _demo_packages():
        from abreast_demo import drill

    from abreast_sidecar.cli.up import signals_as_interrupts

    console = _make_stderr_console()
    options = drill.DrillOptions(
        DRILL_NAMES if every else names, fault_duration_s=seconds, requests_per_s=rate, new_share=share
    )
    with signals_as_interrupts():
        reports = drill.run_drills(options, on_message=lambda line: console.print(f"  {line}"))
    if as_json:
        print(json.dumps([report.to_json_object() for report in reports], indent=2))
    else:
        print_drill_reports(make_console(), reports)
    return ExitCode.CHECK_FAILED if any(report.trouble for report in reports) else ExitCode.OK


def print_drill_reports(out: Console, reports: list[DrillReport]) -> None:
    out.print(build_drill_table(reports))
    for report in reports:
        if report.trouble:
            out.print(style_text(f"{report.drill}: {report.trouble}", "fail"))


def build_drill_table(reports: list[DrillReport]) -> Table:
    columns = ("requests", "errors", "errors (unsafe)", "longest wait", "all on old", "new is back")
    counts = ("sampled", "pending", "lost")
    table = make_table("drill", "", *columns, *counts, numeric_columns={*columns, *counts})
    for report in reports:
        table.add_row(
            report.drill,
            style_text("FAIL", "fail") if report.trouble else style_text("ok", "ok"),
            format_count(report.requests),
            format_count(report.safe_errors),
            format_count(report.unsafe_errors),
            format_drill_time(report.longest_wait),
            format_drill_time(report.until_old),
            format_drill_time(report.until_new),
            *("?" if (value := getattr(report, name)) is None else format_count(value) for name in counts),
        )
    return table


def format_drill_time(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
