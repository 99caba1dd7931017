"""The command line: each command in a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from abreast_sidecar.errors import SidecarError

# name → module in this package that holds a click command called `command`
COMMANDS = {
    "up": "up",
    "demo": "demo",
    "sidecar": "sidecar",
    "envoy": "envoy",
    "migrate": "migrate",
    "status": "status",
    "endpoints": "endpoints",
    "findings": "findings",
    "finding": "finding",
    "pair": "pair",
    "watch": "watch",
    "traffic": "traffic",
    "rollback": "rollback",
    "promote": "promote",
    "doctor": "doctor",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"abreast_sidecar.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="abreast", prog_name="abreast")
def abreast() -> None:
    """Run the old and the new version of a service side by side, and read what differs."""


def main(*args: Any, **kwargs: Any) -> None:
    try:
        abreast(*args, **kwargs)
    except SidecarError as error:
        click.echo(f"abreast: {error}", err=True)
        sys.exit(2)
