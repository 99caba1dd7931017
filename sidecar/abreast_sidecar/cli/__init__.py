"""The command line. The module of a command is imported only when the command runs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from abreast_sidecar.cli.exit_codes import EXIT_MEANINGS, ExitCode, handle_error

# `up`, `demo` and `faults` start processes while gRPC's threads run. gRPC's fork handlers can crash the new process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# name → (module that defines NAME_command, line in the help)
COMMANDS = {
    "up": ("up", "Start everything for two versions that already run."),
    "demo": ("demo", "Run a demo shop in two versions and show what differs."),
    "sidecar": ("serve", "Run the worker, the API and Envoy's control plane."),
    "collector": ("serve", "Receive the captures that Envoy makes."),
    "envoy": ("serve", "Render and validate Envoy's configuration."),
    "config": ("serve", "Check abreast.yaml, and describe its fields."),
    "migrate": ("serve", "Update the schema of the ledger."),
    "status": ("status", "Show the outcomes of the sampled requests."),
    "verdict": ("verdict", "Decide whether the new version can take over."),
    "report": ("verdict", "Write the verdict and its evidence to two files."),
    "endpoints": ("status", "List the endpoints with outcomes and response times."),
    "endpoint": ("status", "Compare the response times of one endpoint."),
    "findings": ("findings", "List the differences by cause, the most harmful first."),
    "finding": ("findings", "Show one finding with examples, or set its status."),
    "pairs": ("pairs", "List the compared requests, newest first."),
    "pair": ("pairs", "Show both responses of one request."),
    "watch": ("findings", "Print findings as they appear and grow."),
    "traffic": ("traffic", "Show or change the users' shares and the mirroring."),
    "rollback": ("traffic", "Send all users to old at once."),
    "ramp": ("rollout", "Move users to new step by step, based on evidence."),
    "guard": ("rollout", "Show or change the automatic rollback."),
    "promote": ("traffic", "Send all users to new."),
    "rules": ("rules", "Manage the rules for known differences."),
    "drill": ("drill", "Fail a part of the requests to new, and report what users notice."),
    "faults": ("demo", "Break one part of a demo and measure the effect on users."),
    "token": ("access", "Manage the tokens of callers."),
    "key": ("access", "Rotate the key of the hashes of secrets."),
    "audit": ("access", "List changes and looks at bodies."),
    "compare": ("compare", "Compare two responses in files."),
    "doctor": ("doctor.run", "Check every part and report what to fix."),
    "completion": ("serve", "Print the script for completion in a shell."),
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
        """Write the table's lines, so that the help imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_module, line) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), meaning) for code, meaning in EXIT_MEANINGS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would exit with 1
            return handle_error(error)

    def main(self, *args: Any, **click_options: Any) -> NoReturn:
        """Run the command and exit the process with one of the documented codes."""
        click_options |= {"standalone_mode": False, "prog_name": "abreast"}
        try:
            code = super().main(*args, **click_options)
            sys.stdout.flush()  # raises if the reader closed the pipe
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # handle_error re-raises unexpected ones
            code = handle_error(error)
        sys.exit(code if isinstance(code, int) else ExitCode.OK)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="abreast", prog_name="abreast")
def abreast() -> None:
    """Run the old and the new version of a service side by side, and show what differs."""


def main(*args: Any, **kwargs: Any) -> None:
    abreast(*args, **kwargs)
