"""`abreast drill --running`: the same in a stack that runs, with what may be broken there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from abreast_sidecar.cli.connection import DEFAULT_ADDRESS
from abreast_sidecar.cli.parameters import TARGET
from abreast_sidecar.embedded import faults
from abreast_sidecar.embedded.breaking import Broken

if TYPE_CHECKING:
    from abreast_demo.drill import Options
    from abreast_demo.noticed import Report

KILLED, HANGS = "new-killed", "new-hangs"

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--running",
        is_flag=True,
        help="Break the stack of an abreast up or abreast demo that runs on this machine.",
    ),
    click.option(
        "--address",
        type=TARGET,
        envvar="ABREAST_SIDECAR",
        default=DEFAULT_ADDRESS,
        show_default=True,
        show_envvar=True,
        help="With --running: which one, by its sidecar's gRPC.",
    ),
    click.option(
        "--new-pid",
        type=click.IntRange(2),
        default=None,
        help="With --running: the process of your new version; it is broken with all that it has started.",
    ),
    click.option(
        "--path",
        "paths",
        multiple=True,
        default=["/"],
        show_default=True,
        help="With --running: what the drill's users GET from your services; may be repeated.",
    ),
    click.option(
        "--yes",
        is_flag=True,
        help="With --running: kill what can't be started again here, without a question.",
    ),
)


@dataclass(frozen=True)
class Running:
    running: bool
    address: str
    new_pid: int | None
    paths: tuple[str, ...]
    yes: bool


def running_options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def check(ctx: click.Context, asked: Running) -> None:
    if any(not path.startswith("/") or not path.isprintable() for path in asked.paths):
        raise click.UsageError("--path must begin with /, such as /products/7")
    if asked.running:
        return
    for name in ("new_pid", "paths", "yes"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = {"paths": "path"}.get(name, name).replace("_", "-")
            raise click.UsageError(f"--{option} goes with --running only")


def drill(asked: Running, options: Options, *, every: bool, say: Callable[[str], None]) -> list[Report]:
    """Raise ServerError where there is nothing to drill, or it can't be done. All is checked before anything is broken."""
    from abreast_demo import drill as drills

    pid = asked.new_pid or 0
    with Broken(asked.address) as broken:
        if every:
            names = _all(options.names, broken, named=bool(pid))
            options = dataclasses.replace(options, names=names)
        if pid and not broken.facts["shop"]:
            faults.check(pid, {os.getpid()})
        for name in options.names:
            broken.check(name, pid)
        if KILLED in options.names and not broken.facts["shop"]:
            _assent(pid, asked)
        return drills.drill_running(broken, asked.address, options, new_pid=pid, paths=asked.paths, say=say)


def _all(names: tuple[str, ...], broken: Broken, *, named: bool) -> tuple[str, ...]:
    """What can be repaired there."""
    found = {*broken.facts["drills"], *((HANGS,) if named else ())}
    return tuple(name for name in names if name in found)


def _assent(pid: int, asked: Running) -> None:
    what = f"{faults.described(pid)} will be killed, and nothing here can start it again: that is yours to do"
    if asked.yes:
        click.echo(what, err=True)
    else:
        click.confirm(f"{what}. Go on?", abort=True, err=True)
