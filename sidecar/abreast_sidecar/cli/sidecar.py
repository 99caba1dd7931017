from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from abreast_sidecar import runtime
from abreast_sidecar.cli.parameters import Parsed
from abreast_sidecar.settings import PREFIX, Settings

Command = TypeVar("Command", bound=Callable[..., Any])


def every_setting(command: Command) -> Command:
    """An option for each setting: --batch-size stands above ABREAST_BATCH_SIZE. None for a secret, which `ps` would show."""
    for part in reversed(dataclasses.fields(Settings)):
        if part.metadata["secret"]:
            continue
        shown = ", ".join(part.default) if isinstance(part.default, tuple) else part.default
        click.option(
            "--" + part.name.replace("_", "-"),
            type=Parsed(part.metadata["parse"].__name__, part.metadata["parse"]),
            help=f"{part.metadata['doc']}.  [{PREFIX}{part.name.upper()}; default: {'none' if shown == '' else shown}]",
        )(command)
    return command


@click.command
@every_setting
def command(**options: Any) -> None:
    """Run the sidecar: compares what services send, keeps the ledger, steers Envoy, answers questions.

    Every option is also a variable ABREAST_NAME. SIGTERM and Ctrl-C let work under way finish.
    """
    from abreast_sidecar import logs
    from abreast_sidecar.app import serve

    given = {name: value for name, value in options.items() if value is not None}
    settings = dataclasses.replace(Settings.from_environment(os.environ), **given)
    logs.configure(settings.log_level)
    run(lambda stop: serve(settings, stop))


def run(part: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Until SIGTERM or SIGINT; a second one ends at once."""

    async def until_signal() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def asked(name: signal.Signals) -> None:
            loop.remove_signal_handler(name)
            stop.set()

        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, asked, name)
        await part(stop)

    runtime.run(until_signal())
