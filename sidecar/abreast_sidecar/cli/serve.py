"""`abreast sidecar` and `abreast migrate`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import click

from abreast_sidecar import aio
from abreast_sidecar.cli.options import ParserParamType, read_settings, setting_options
from abreast_sidecar.settings import Settings, database_url


@click.command
@setting_options(Settings)
def sidecar_command(**options: Any) -> None:
    """Run the worker, the API and Envoy's control plane.

    Each option is also an environment variable, named in its description. SIGTERM and Ctrl-C stop the sidecar after
    it has finished the work in progress.
    """
    from abreast_sidecar import logs
    from abreast_sidecar.app import serve

    settings = read_settings(Settings, options)
    logs.configure(settings.log_level)
    run_until_signal(lambda stop: serve(settings, stop))


def run_until_signal(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run until SIGTERM or SIGINT. A second signal ends the process at once."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def handle_signal(name: signal.Signals) -> None:
            loop.remove_signal_handler(name)
            stop.set()

        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, handle_signal, name)
        await serve(stop)

    aio.run(main())


@click.command
@click.option(
    "--postgres-url",
    type=ParserParamType("postgres_url", database_url),
    help="The ledger's Postgres, in place of ABREAST_POSTGRES_URL.",
)
def migrate_command(postgres_url: str | None) -> None:
    """Update the schema of the ledger. The sidecar also does this when it starts."""
    from abreast_sidecar.store.migrate import migrate

    url = postgres_url or Settings.from_environment(os.environ).postgres_url
    click.echo(f"the ledger has schema version {asyncio.run(migrate(url))}")
