"""`abreast doctor`: why does nothing show up?"""

from __future__ import annotations

import dataclasses
import json
import os

import click
from rich.table import Table

from abreast_sidecar.cli.checks import Check, DoctorAddresses, run_checks
from abreast_sidecar.cli.connection import DEFAULT_ADDRESS, json_option
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.humane import format_quantity, to_printable
from abreast_sidecar.cli.parameters import TARGET_TYPE
from abreast_sidecar.cli.tables import Console, make_console, style_text
from abreast_sidecar.embedded.record import find_run
from abreast_sidecar.settings import Settings

DEFAULT_ENVOY_ADMIN = "127.0.0.1:9901"
STATE_LABELS = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


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
    type=TARGET_TYPE,
    default=DEFAULT_ADDRESS,
    envvar="ABREAST_SIDECAR",
    show_default=True,
    show_envvar=True,
    help="The sidecar's gRPC.",
)
@json_option
def doctor_command(
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
    options = {
        "ABREAST_ENVOY_ADMIN": ",".join(envoy_admin),
        "ABREAST_REDIS_URL": redis_url,
        "ABREAST_POSTGRES_URL": postgres_url,
        "ABREAST_HTTP_LISTEN": http and http.removeprefix("http://").rstrip("/"),
    }
    overrides = {name: value for name, value in options.items() if value}
    settings = Settings.from_environment({**find_run(address), **os.environ, **overrides})
    checks = run_checks(build_addresses(settings, address, service))
    if as_json:
        click.echo(
            json.dumps(
                {"checks": [dataclasses.asdict(check) for check in checks]}, indent=2, ensure_ascii=False
            )
        )
    else:
        print_checks(make_console(), checks)
    return ExitCode.CHECK_FAILED if any(check.state == "fail" for check in checks) else ExitCode.OK


def build_addresses(settings: Settings, address: str, service: str) -> DoctorAddresses:
    host, _, port = settings.http_listen.rpartition(":")
    return DoctorAddresses(
        grpc=address,
        http_url=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
        envoy_admin=settings.envoy_admin or (DEFAULT_ENVOY_ADMIN,),
        redis_url=settings.redis_url,
        postgres_url=settings.postgres_url,
        service=service,
    )


def print_checks(out: Console, checks: list[Check]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    part = ""
    for check in checks:
        grid.add_row(
            style_text(STATE_LABELS[check.state], check.state),
            style_text(check.part if check.part != part else "", "bold"),
            check.name,
            to_printable(check.found),
        )
        if check.advice:
            grid.add_row("", "", "", style_text(f"→ {check.advice}", check.state))
        part = check.part
    out.print(grid)
    failure_count, warning_count = (
        sum(check.state == state for check in checks) for state in ("fail", "warn")
    )
    out.print()
    if failure_count or warning_count:
        out.print(
            f"{format_quantity(failure_count, 'failure')}, {format_quantity(warning_count, 'warning')}; begin with the first"
        )
    else:
        out.print("all is well")
