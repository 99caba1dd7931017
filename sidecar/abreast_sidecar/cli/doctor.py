"""`abreast doctor`: why does nothing show up?"""

from __future__ import annotations

import dataclasses
import json
import os

import click
from rich.table import Table

from abreast_sidecar.cli.checks import Addresses, Check, examine
from abreast_sidecar.cli.connection import DEFAULT_ADDRESS, json_option
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import counted, printable
from abreast_sidecar.cli.parameters import TARGET
from abreast_sidecar.cli.tables import Console, console, styled
from abreast_sidecar.embedded.record import find_run
from abreast_sidecar.settings import Settings

DEFAULT_ADMIN = "127.0.0.1:9901"
MARKS = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


@click.command()
@click.option(
    "--service", default="", help="The service; may be left out where one has an Envoy, or is the only one."
)
@click.option(
    "--envoy-admin",
    multiple=True,
    help="Envoy's admin address; may be repeated.  [env var: ABREAST_ENVOY_ADMIN]",
)
@click.option("--redis-url", help="The Redis that captures go to.  [env var: ABREAST_REDIS_URL]")
@click.option("--postgres-url", help="The ledger.  [env var: ABREAST_POSTGRES_URL]")
@click.option("--http", help="The sidecar's HTTP address.  [env var: ABREAST_HTTP_LISTEN]")
@click.option(
    "--address",
    type=TARGET,
    default=DEFAULT_ADDRESS,
    envvar="ABREAST_SIDECAR",
    show_default=True,
    show_envvar=True,
    help="The sidecar's gRPC.",
)
@json_option
def command(
    service: str,
    envoy_admin: tuple[str, ...],
    redis_url: str | None,
    postgres_url: str | None,
    http: str | None,
    address: str,
    as_json: bool,
) -> int:
    """Tell why nothing shows up: look at every part, in the order of a request's way.

    Where `abreast up` runs on this machine, no option is needed. Exits with 1 where something fails.
    """
    given = {
        "ABREAST_ENVOY_ADMIN": ",".join(envoy_admin),
        "ABREAST_REDIS_URL": redis_url,
        "ABREAST_POSTGRES_URL": postgres_url,
        "ABREAST_HTTP_LISTEN": http and http.removeprefix("http://").rstrip("/"),
    }
    flags = {name: value for name, value in given.items() if value}
    settings = Settings.from_environment({**find_run(address), **os.environ, **flags})
    checks = examine(addresses(settings, address, service))
    if as_json:
        click.echo(
            json.dumps(
                {"checks": [dataclasses.asdict(check) for check in checks]}, indent=2, ensure_ascii=False
            )
        )
    else:
        show(console(), checks)
    return Exit.NO if any(check.state == "fail" for check in checks) else Exit.OK


def addresses(settings: Settings, address: str, service: str) -> Addresses:
    host, _, port = settings.http_listen.rpartition(":")
    return Addresses(
        grpc=address,
        http_url=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
        envoy_admin=settings.envoy_admin or (DEFAULT_ADMIN,),
        redis_url=settings.redis_url,
        postgres_url=settings.postgres_url,
        service=service,
    )


def show(out: Console, checks: list[Check]) -> None:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    part = ""
    for check in checks:
        made.add_row(
            styled(MARKS[check.state], check.state),
            styled(check.part if check.part != part else "", "bold"),
            check.name,
            printable(check.found),
        )
        if check.advice:
            made.add_row("", "", "", styled(f"→ {check.advice}", check.state))
        part = check.part
    out.print(made)
    failed, warned = (sum(check.state == state for check in checks) for state in ("fail", "warn"))
    out.print()
    if failed or warned:
        out.print(f"{counted(failed, 'failure')}, {counted(warned, 'warning')}; begin with the first")
    else:
        out.print("all is well")
