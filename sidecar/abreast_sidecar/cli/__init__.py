"""The command line: each command in a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from abreast_sidecar.cli.exit_codes import EXIT_MEANINGS, ExitCode, handle_error

# `up`, `demo` and `drill` start servers while gRPC's threads run; its handlers for forks can crash the new process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# name → (module in this package that holds a click command called `command`, its line in the help)
COMMANDS = {
    "up": ("up", "Start everything for two versions that already run."),
    "demo": ("demo", "A shop in two versions, with traffic: see what differs."),
    "sidecar": ("serve", "Run the worker, the API and Envoy's control."),
    "envoy": ("envoy", "Render and check Envoy's configuration."),
    "migrate": ("serve", "Bring the ledger's schema up to date."),
    "status": ("status", "How the sampled requests ended, held against Envoy's count."),
    "verdict": ("verdict", "May the new version take over? PASS, FAIL or INCONCLUSIVE."),
    "report": ("report", "The verdict with its evidence as two files, for a change ticket."),
    "endpoints": ("endpoints", "The endpoints that were seen, with outcomes and times."),
    "endpoint": ("endpoints", "How fast both versions answer the same requests of one."),
    "findings": ("findings", "What differs, one cause a row."),
    "finding": ("findings", "One finding, with examples to try."),
    "pairs": ("pairs", "Compared requests, newest first."),
    "pair": ("pairs", "One request: both answers, what differs, and when."),
    "watch": ("findings", "Findings as they appear and grow."),
    "traffic": ("traffic", "Who answers users, and what is mirrored; or change it."),
    "rollback": ("traffic", "Send all users to the old version, at once."),
    "ramp": ("rollout", "Move users to the new version step by step, on evidence."),
    "guard": ("rollout", "Send users back by itself when the new version fails them."),
    "promote": ("traffic", "Send all users to the new version."),
    "rules": ("rules", "What is known about differences: ignored, tolerated, expected."),
    "drill": ("demo", "Break a part on purpose, and see what users notice."),
    "compare": ("compare", "Two answers in files: what differs."),
    "doctor": ("doctor.run", "Why does nothing show up?"),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"abreast_sidecar.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """From the table, so that help imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_module, line) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), meaning) for code, meaning in EXIT_MEANINGS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would end with 1
            return handle_error(error)

    def main(self, *args: Any, **click_options: Any) -> NoReturn:
        """Always ends the process, with one line on stderr and an exit code of ours."""
        click_options |= {"standalone_mode": False, "prog_name": "abreast"}
        try:
            code = super().main(*args, **click_options)
            sys.stdout.flush()  # a reader that left shows up here
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # what is not foreseen is raised again
            code = handle_error(error)
        sys.exit(code if isinstance(code, int) else ExitCode.OK)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="abreast", prog_name="abreast")
def abreast() -> None:
    """Run the old and the new version of a service side by side, and read what differs."""


def main(*args: Any, **kwargs: Any) -> None:
    abreast(*args, **kwargs)
