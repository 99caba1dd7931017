from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import click

from abreast_sidecar import aio as runtime
from abreast_sidecar.cli.options import ParserParamType, read_settings, setting_options
from abreast_sidecar.settings import Settings, database_url


@click.command
@setting_options(Settings)
def sidecar_command(**options: Any) -> None:
    """Run the sidecar: compares what services send, keeps the ledger, steers Envoy, answers questions.

    Every option is also a variable ABREAST_NAME. SIGTERM and Ctrl-C let work under way finish.
    """
    from abreast_sidecar import logs
    from abreast_sidecar.app import serve

    settings = read_settings(Settings, options)
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
    type=ParserParamType("postgres_url", database_url),
    help="The ledger's Postgres, in place of ABREAST_POSTGRES_URL.",
)
def migrate_command(postgres_url: str | None) -> None:
    """Bring the ledger's tables up to this version. The sidecar does so itself when it starts."""
    from abreast_sidecar.store.migrate import migrate

    url = postgres_url or Settings.from_environment(os.environ).postgres_url
    click.echo(f"the ledger has schema version {asyncio.run(migrate(url))}")
