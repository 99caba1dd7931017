"""`abreast envoy`: render Envoy's configuration from settings, and validate it with Envoy."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import click

from abreast_sidecar.envoy.settings import EnvoySettings, to_env_value
from abreast_sidecar.errors import ServerError, SettingError
from abreast_sidecar.settings import ENV_PREFIX


@click.group()
def envoy_command() -> None:
    """Render and validate Envoy's configuration."""


def envoy_setting_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each setting. The settings read the variables, so that one place checks both."""
    for setting in reversed(dataclasses.fields(EnvoySettings)):
        name = setting.name.replace("_", "-")
        default = to_env_value(setting.default) or "none"
        text = f"{setting.metadata['doc']}  [{ENV_PREFIX}{setting.name.upper()}; default: {default}]"
        if isinstance(setting.default, bool):
            function = click.option(f"--{name}/--no-{name}", setting.name, default=None, help=text)(function)
        else:
            function = click.option(f"--{name}", setting.name, metavar="VALUE", help=text)(function)
    return function


@envoy_command.command("render")
@envoy_setting_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: stdout]")
@click.option("--validate/--no-validate", default=True, help="Validate the result with Envoy, if it is installed.")
def render_command(output: Path | None, validate: bool, **flags: str | bool | None) -> None:
    """Print an envoy.yaml from the options. ABREAST_* variables replace options that you omit."""
    from abreast_sidecar.envoy.render import find_envoy_binary, render_config, validate_config

    config = render_config(
        _read_envoy_settings({name: str(value) for name, value in flags.items() if value is not None})
    )
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
    try:
        output.write_text(config)
    except OSError as error:
        raise SettingError(f"--output can't be written: {error.strerror}: {output}") from error


@envoy_command.command("validate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def validate_command(file: Path) -> None:
    """Validate a configuration file with Envoy."""
    from abreast_sidecar.envoy.render import validate_config

    validate_config(file.read_text())
    click.echo(f"{file} is valid")


def _read_envoy_settings(flags: dict[str, str]) -> EnvoySettings:
    overrides = {ENV_PREFIX + name.upper(): value for name, value in flags.items()}
    try:
        return EnvoySettings.from_environment({**os.environ, **overrides})
    except SettingError as error:
        message = str(error)
        for name in flags:
            message = re.sub(rf"\b{ENV_PREFIX}{name.upper()}\b", "--" + name.replace("_", "-"), message)
        raise SettingError(message) from error
