"""Write Envoy's configuration from settings, and have Envoy check it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import click

from abreast_sidecar.envoy.settings import EnvoySettings, written
from abreast_sidecar.errors import ServerError, SettingError
from abreast_sidecar.settings import PREFIX


@click.group()
def command() -> None:
    """Write Envoy's configuration, and check it."""


def setting_options(function: Callable[..., None]) -> Callable[..., None]:
    """A flag for each setting. The variables are read with the settings, so that both are checked in one place."""
    for part in reversed(dataclasses.fields(EnvoySettings)):
        name = part.name.replace("_", "-")
        default = written(part.default) or "none"
        text = f"{part.metadata['doc']}  [{PREFIX}{part.name.upper()}; default: {default}]"
        if isinstance(part.default, bool):
            function = click.option(f"--{name}/--no-{name}", part.name, default=None, help=text)(function)
        else:
            function = click.option(f"--{name}", part.name, metavar="VALUE", help=text)(function)
    return function


@command.command()
@setting_options
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="write to this file, not to stdout"
)
@click.option(
    "--validate/--no-validate", default=True, help="have Envoy check the result, if it is installed"
)
def render(output: Path | None, validate: bool, **flags: str | bool | None) -> None:
    """Print an envoy.yaml made from the flags, and from ABREAST_* variables where there is no flag."""
    from abreast_sidecar.embedded import envoy_binary
    from abreast_sidecar.envoy import render as rendering

    config = rendering.render(
        _settings({name: str(value) for name, value in flags.items() if value is not None})
    )
    if validate:
        try:
            envoy_binary()
        except ServerError:
            click.echo("abreast: not checked: no envoy is installed here", err=True)
        else:
            rendering.validate(config)
    if output is None:
        click.echo(config, nl=False)
    else:
        _write(output, config)


@command.command("validate")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def validate_file(file: Path) -> None:
    """Have Envoy check a configuration file."""
    from abreast_sidecar.envoy.render import validate

    validate(file.read_text())
    click.echo(f"{file} is fine")


def _settings(flags: dict[str, str]) -> EnvoySettings:
    given = {PREFIX + name.upper(): value for name, value in flags.items()}
    try:
        return EnvoySettings.from_environment({**os.environ, **given})
    except SettingError as error:
        message = str(error)
        for name in flags:
            message = re.sub(rf"\b{PREFIX}{name.upper()}\b", "--" + name.replace("_", "-"), message)
        raise SettingError(message) from error


def _write(output: Path, config: str) -> None:
    try:
        output.write_text(config)
    except OSError as error:
        raise SettingError(f"--output can't be written: {error.strerror}: {output}") from error
