"""`abreast sidecar`, `abreast migrate`, `abreast envoy`, `abreast config` and `abreast completion`: setting up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from abreast_sidecar import aio
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import ParserParamType, config_option, read_settings, setting_options
from abreast_sidecar.client.output import format_quantity
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ServerError, SettingError
from abreast_sidecar.settings import CollectorSettings, Settings, database_url

SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "fish": FishComplete, "zsh": ZshComplete}


@click.command
@config_option
@setting_options(Settings)
def sidecar_command(config: Path | None, **options: Any) -> None:
    """Run the worker, the API and Envoy's control plane.

    Each option is also an environment variable, named in its description. SIGTERM and Ctrl-C stop the sidecar after
    it has finished the work in progress. With --config, the section `sidecar` of the file has the values of options and
    variables that you omit, and its services have the initial shares.
    """
    from abreast_sidecar import logs
    from abreast_sidecar.app import serve
    from abreast_sidecar.envoy.config import load_config

    file = load_config(config) if config else None
    settings = read_settings(Settings, options, file.build_environment() if file else os.environ)
    services = file.build_services() if file else ()
    shared_options = {"collector_listen": settings.collector_listen, "insecure": str(settings.insecure).lower()}
    collector_settings = CollectorSettings.from_environment(os.environ, shared_options)
    logs.configure(settings.log_level)

    async def serve_until_signal() -> None:
        await serve(settings, _set_on_signal(), collector_settings, services)

    aio.run(serve_until_signal())


def _set_on_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle_signal(name: signal.Signals) -> None:
        loop.remove_signal_handler(name)  # a second signal ends the process at once
        stop.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, handle_signal, name)
    return stop


@click.command
@setting_options(CollectorSettings, without=("service", "release", "enabled", "effect_wait"))
def collector_command(**options: Any) -> None:
    """Receive the captures that Envoy makes, redact them and send them to Redis.

    The sidecar contains a collector. Run more of them for more captures: they keep no state.
    """
    from abreast_sidecar import logs
    from abreast_sidecar.collector.server import Collector

    collector = Collector(read_settings(CollectorSettings, options))
    logs.configure("info")

    async def collect_until_signal() -> None:
        stop = _set_on_signal()
        await collector.start()
        await stop.wait()
        await collector.stop()

    aio.run(collect_until_signal())


@click.command
@click.option(
    "--postgres-url",
    type=ParserParamType("postgres_url", database_url),
    help="The ledger's Postgres, in place of ABREAST_POSTGRES_URL.",
)
@click.option("--writer", metavar="ROLE", default="", help="Give this role the rights that a sidecar needs.")
@click.option("--reader", metavar="ROLE", default="", help="Let this role read all but tokens and webhooks.")
def migrate_command(postgres_url: str | None, writer: str, reader: str) -> None:
    """Update the schema of the ledger. The sidecar also does this when it starts."""
    from abreast_sidecar.store.migrate import migrate

    url = postgres_url or Settings.from_environment(os.environ).postgres_url
    click.echo(f"the ledger has schema version {asyncio.run(migrate(url, writer=writer, reader=reader))}")


def list_service_warnings(services: Sequence[EnvoySettings]) -> Iterator[str]:
    for settings in services:
        prefix = f"{settings.service}: " if len(services) > 1 else ""
        yield from (f"{prefix}{warning}" for warning in settings.list_warnings())


@click.group()
def envoy_command() -> None:
    """Render and validate Envoy's configuration."""


@envoy_command.command("render")
@config_option
@setting_options(EnvoySettings, secrets=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: stdout]")
@click.option("--validate/--no-validate", default=True, help="Validate the result with Envoy, if it is installed.")
def render_command(output: Path | None, validate: bool, config: Path | None, **flags: str | bool | None) -> None:
    """Print an envoy.yaml from the options. ABREAST_* variables replace options that you omit.

    With --config, the services come from the file. Options and variables override only its section `envoy`.
    """
    from abreast_sidecar.envoy.config import load_config
    from abreast_sidecar.envoy.render import find_envoy_binary, render_config, validate_config, write_config

    services = (
        (read_settings(EnvoySettings, flags),) if config is None else load_config(config).build_services(options=flags)
    )
    for warning in list_service_warnings(services):
        click.echo(f"abreast: {warning}", err=True)
    rendered = render_config(*services)
    if validate:
        try:
            find_envoy_binary()
        except ServerError:
            click.echo("abreast: not validated, because no envoy is installed here", err=True)
        else:
            validate_config(rendered)
    if output is None:
        click.echo(rendered, nl=False)
        return
    try:
        write_config(output, rendered, is_secret=services[0].has_secrets)
    except OSError as error:
        raise SettingError(f"--output can't be written: {error.strerror}: {output}") from error


@envoy_command.command("validate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def validate_command(file: Path) -> None:
    """Validate a configuration file with Envoy."""
    from abreast_sidecar.envoy.render import validate_config

    validate_config(file.read_text())
    click.echo(f"{file} is valid")


@click.group()
def config_command() -> None:
    """Check abreast.yaml, and describe its fields."""


@config_command.command("check")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def check_config_command(file: Path) -> int:
    """Check a configuration file. Exits with 1 if it has errors, and prints each with its line."""
    from abreast_sidecar.envoy.config import ConfigError, load_config

    try:
        services = load_config(file).build_services(environment={})
    except ConfigError as error:
        for line in error.lines:
            click.echo(line)
        return ExitCode.CHECK_FAILED
    for warning in list_service_warnings(services):
        click.echo(f"abreast: {warning}", err=True)
    names = ", ".join(settings.service for settings in services)
    click.echo(f"{file} is valid, with {format_quantity(len(services), 'service')}: {names}")
    return ExitCode.OK


@config_command.command("schema")
def print_config_schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from abreast_sidecar.envoy.config import build_schema

    click.echo(json.dumps(build_schema(), indent=2))


@click.command
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, options and their values in a shell. Load it when the shell starts."""
    # click reads the variable in each call of `abreast`.
    complete = SHELLS[shell](click.get_current_context().find_root().command, {}, "abreast", "_ABREAST_COMPLETE")
    click.echo(complete.source())
