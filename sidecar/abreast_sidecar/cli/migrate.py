from __future__ import annotations

import asyncio
import os

import click

from abreast_sidecar.cli.parameters import ParserParamType
from abreast_sidecar.settings import Settings
from abreast_sidecar.settings import database_url as parsed


@click.command
@click.option(
    "--postgres-url",
    type=ParserParamType("postgres_url", parsed),
    help="The ledger's Postgres, in place of ABREAST_POSTGRES_URL.",
)
def migrate_command(postgres_url: str | None) -> None:
    """Bring the ledger's tables up to this version. The sidecar does so itself when it starts."""
    from abreast_sidecar.store import migrate

    url = postgres_url or Settings.from_environment(os.environ).postgres_url
    click.echo(f"the ledger has schema version {asyncio.run(migrate(url))}")
