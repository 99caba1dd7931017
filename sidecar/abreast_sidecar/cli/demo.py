"""`abreast demo`: a shop in two versions behind Envoy, fifteen seconds of traffic, and what differs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.parameters import Parsed
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast_sidecar.envoy.settings import Endpoint

PARTS = {"fastapi", "httpx", "pydantic"}


def _listener(value: str) -> Endpoint:
    from abreast_sidecar.envoy.settings import listener

    return listener(value)


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
    type=Parsed("[host]:port", _listener),
    help="Where users reach Envoy.  [default: 127.0.0.1:8080, or a free port if that is taken]",
)
def command(
    *, once: bool, as_json: bool, seconds: float, rate: float, seed: int, listen: Endpoint | None
) -> int:
    """Run a small shop in two versions, send it traffic, and show what differs.

    The new version has planted mistakes; the run says which of them were found. The shop stays open until Ctrl-C.
    """
    try:
        from abreast_demo import run, show
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PARTS:
            raise
        raise SettingError("the demo needs more parts; run: pip install 'abreast[demo]'") from error
    from rich.console import Console

    from abreast_sidecar.cli import tables

    def finished(at_end: run.Finished) -> None:
        shown.finished(at_end)
        if as_json:
            print(json.dumps(at_end.result.for_machines(), indent=2), flush=True)
        if not once:
            shown.say("the shop stays open, with a little traffic, until Ctrl-C")

    quiet = Console(stderr=True, markup=False, highlight=False, emoji=False)
    console = quiet if as_json else tables.console()
    with show.Show(console, results=not as_json) as shown:
        listener = run.Listener(
            say=shown.say,
            wait=shown.wait,
            ready=shown.ready,
            step=shown.step,
            progress=shown.progress,
            regression=shown.regression,
            finished=finished,
        )
        options = run.Options(seconds=seconds, rate=rate, seed=seed, listen=listen, stay=not once)
        result = run.run(options, listener)
    sys.stdout.flush()
    if result is None:
        return Exit.INTERRUPTED
    return Exit.OK if result.as_planted or not once else Exit.NO
