"""`abreast envoy`: render Envoy's configuration from settings, and validate it with Envoy."""

from __future__ import annotations

from pathlib import Path

import click

from abreast_sidecar.cli.options import read_settings, setting_options
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ServerError, SettingError


@click.group()
def envoy_command() -> None:
    """Render and validate Envoy's configuration."""


@envoy_command.command("render")
@setting_options(EnvoySettings, secrets=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: stdout]")
@click.option("--validate/--no-validate", default=True, help="Validate the result with Envoy, if it is installed.")
def render_command(output: Path | None, validate: bool, **flags: str | bool | None) -> None:
    """Print an envoy.yaml from the options. ABREAST_* variables replace options that you omit."""
    from abreast_sidecar.envoy.render import find_envoy_binary, render_config, validate_config

    config = render_config(read_settings(EnvoySettings, flags))
    if validate:
        try:
            find_envoy_binary()
        except ServerError:
            click.echo("abreast: not validated, because no envoy is installed here", err=True)
        else:
            validate_config(config)
    if output is None:
        click.echo(config, nl=False)
        return
    _write_config(output, config)


@envoy_command.command("validate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def validate_command(file: Path) -> None:
    """Validate a configuration file with Envoy."""
    from abreast_sidecar.envoy.render import validate_config

    validate_config(file.read_text())
    click.echo(f"{file} is valid")


def _write_config(output: Path, config: str) -> None:
    try:
        output.write_text(config)
    except OSError as error:
        raise SettingError(f"--output can't be written: {error.strerror}: {output}") from error
