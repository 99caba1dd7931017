from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from abreast_sidecar import aio as runtime
from abreast_sidecar.cli.options import ParserParamType
from abreast_sidecar.settings import ENV_PREFIX, Settings
from abreast_sidecar.settings import database_url as parsed

ServeCommand = TypeVar("ServeCommand", bound=Callable[..., Any])


def setting_options(command: ServeCommand) -> ServeCommand:
    """An option for each setting: --batch-size stands above ABREAST_BATCH_SIZE. None for a secret, which `ps` would show."""
    for setting in reversed(dataclasses.fields(Settings)):
        if setting.metadata["secret"]:
            continue
        default_text = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
        click.option(
            "--" + setting.name.replace("_", "-"),
            type=ParserParamType(setting.metadata["parse"].__name__, setting.metadata["parse"]),
            help=f"{setting.metadata['doc']}.  [{ENV_PREFIX}{setting.name.upper()}; default: {'none' if default_text == '' else default_text}]",
        )(command)
    return command


@click.command
@setting_options
def sidecar_command(**options: Any) -> None:
    """Run the sidecar: compares what services send, keeps the ledger, steers Envoy, answers questions.

    Every option is also a variable ABREAST_NAME. SIGTERM and Ctrl-C let work under way finish.
    """
    from abreast_sidecar import logs
    from abreast_sidecar.app import serve

    overrides = {name: value for name, value in options.items() if value is not None}
    settings = dataclasses.replace(Settings.from_environment(os.environ), **overrides)
    logs.configure(settings.log_level)
    run_until_signal(lambda stop: serve(settings, stop))


def run_until_signal(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Until SIGTERM or SIGINT; a second one ends at once."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def handle_signal(name: signal.Signals) -> None:
            loop.remove_signal_handler(name)
            stop.set()

        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, handle_signal, name)
        await serve(stop)

    runtime.run(main())


@click.command
@click.option(
    "--postgres-url",
    type=ParserParamType("postgres_url", parsed),
    help="The ledger's Postgres, in place of ABREAST_POSTGRES_URL.",
)
def migrate_command(postgres_url: str | None) -> None:
    """Bring the ledger's tables up to this version. The sidecar does so itself when it starts."""
    from abreast_sidecar.store.migrate import migrate

    url = postgres_url or Settings.from_environment(os.environ).postgres_url
    click.echo(f"the ledger has schema version {asyncio.run(migrate(url))}")
