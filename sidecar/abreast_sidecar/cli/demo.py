"""`abreast demo`: a shop in two versions behind Envoy, fifteen seconds of traffic, and what differs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.parameters import ParserParamType
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast_sidecar.envoy.settings import SocketAddress

DEMO_PACKAGES = {"fastapi", "httpx", "pydantic"}


def _parse_listener(value: str) -> SocketAddress:
    from abreast_sidecar.envoy.settings import parse_listener

    return parse_listener(value)


@click.command()
@click.option("--once", is_flag=True, help="End after the result; exit code 1 if it is not as planted.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object for machines; the rest goes to stderr."
)
@click.option(
    "--seconds", type=click.FloatRange(5, 600), default=15.0, show_default=True, help="How long users come."
)
@click.option(
    "--rate", type=click.FloatRange(20, 2000), default=150.0, show_default=True, help="Requests a second."
)
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
        from abreast_demo import run, show
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_PACKAGES:
            raise
        raise SettingError("the demo needs more parts; run: pip install 'abreast[demo]'") from error
    from rich.console import Console

    from abreast_sidecar.cli import tables

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
        options = run.DemoOptions(
            duration_s=seconds, requests_per_s=rate, seed=seed, listen=listen, keep_open=not once
        )
        result = run.run_demo(options, listener)
    sys.stdout.flush()
    if result is None:
        return ExitCode.INTERRUPTED
    return ExitCode.OK if result.is_as_planted or not once else ExitCode.CHECK_FAILED
