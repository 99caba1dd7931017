"""Write Envoy's configuration from settings, and have Envoy check it."""

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
    """Write Envoy's configuration, and check it."""


def envoy_setting_options(function: Callable[..., None]) -> Callable[..., None]:
    """A flag for each setting. The variables are read with the settings, so that both are checked in one place."""
    for setting in reversed(dataclasses.fields(EnvoySettings)):
        name = setting.name.replace("_", "-")
        default = to_env_value(setting.default) or "none"
        text = f"{setting.metadata['doc']}  [{ENV_PREFIX}{setting.name.upper()}; default: {default}]"
        if isinstance(setting.default, bool):
            function = click.option(f"--{name}/--no-{name}", setting.name, default=None, help=text)(function)
        else:
            function = click.option(f"--{name}", setting.name, metavar="VALUE", help=text)(function)
    return function


@envoy_command.command()
@envoy_setting_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="write to this file, not to stdout")
@click.option("--validate/--no-validate", default=True, help="have Envoy check the result, if it is installed")
def render(output: Path | None, validate: bool, **flags: str | bool | None) -> None:
    """Print an envoy.yaml made from the flags, and from ABREAST_* variables where there is no flag."""
    from abreast_sidecar.envoy import render as rendering
    from abreast_sidecar.envoy.render import find_envoy_binary

    config = rendering.render(
        _read_envoy_settings({name: str(value) for name, value in flags.items() if value is not None})
    )
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


def _read_envoy_settings(flags: dict[str, str]) -> EnvoySettings:
    overrides = {ENV_PREFIX + name.upper(): value for name, value in flags.items()}
    try:
        return EnvoySettings.from_environment({**os.environ, **overrides})
    except SettingError as error:
        message = str(error)
        for name in flags:
            message = re.sub(rf"\b{ENV_PREFIX}{name.upper()}\b", "--" + name.replace("_", "-"), message)
        raise SettingError(message) from error


def _write_config(output: Path, config: str) -> None:
    try:
        output.write_text(config)
    except OSError as error:
        raise SettingError(f"--output can't be written: {error.strerror}: {output}") from error
