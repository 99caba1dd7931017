"""Write Envoy's configuration from settings, and have Envoy check it."""

from __future__ import annotations

from pathlib import Path

import click

from abreast_sidecar.cli.options import read_settings, setting_options
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ServerError, SettingError


@click.group()
def envoy_command() -> None:
    """Write Envoy's configuration, and check it."""


@envoy_command.command()
@setting_options(EnvoySettings, secrets=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="write to this file, not to stdout")
@click.option("--validate/--no-validate", default=True, help="have Envoy check the result, if it is installed")
def render(output: Path | None, validate: bool, **flags: str | bool | None) -> None:
    """Print an envoy.yaml made from the flags, and from ABREAST_* variables where there is no flag."""
    from abreast_sidecar.envoy import render as rendering
    from abreast_sidecar.envoy.render import find_envoy_binary

    config = rendering.render(read_settings(EnvoySettings, flags))
    if validate:
        try:
            find_envoy_binary()
        except ServerError:
            click.echo("abreast: not checked: no envoy is installed here", err=True)
        else:
            rendering.validate(config)
    if output is None:
        click.echo(config, nl=False)
    else:
        _write_config(output, config)


@envoy_command.command("validate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def validate_command(file: Path) -> None:
    """Have Envoy check a configuration file."""
    from abreast_sidecar.envoy.render import validate

    validate(file.read_text())
    click.echo(f"{file} is fine")


def _write_config(output: Path, config: str) -> None:
    try:
        output.write_text(config)
    except OSError as error:
        raise SettingError(f"--output can't be written: {error.strerror}: {output}") from error
