"""Exit codes of all commands, and the one place that turns an error into a code and a line on stderr."""

from __future__ import annotations

import enum
import errno
import os
import sys

import click

from abreast_sidecar.errors import (
    ArgumentError,
    LedgerError,
    NotFoundError,
    RedisError,
    ServerError,
    SettingError,
    SidecarError,
)


class ExitCode(enum.IntEnum):
    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    INCONCLUSIVE = 10
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EXIT_MEANINGS = {
    ExitCode.OK: "success",
    ExitCode.CHECK_FAILED: "the check failed: doctor found a failure, verdict is FAIL, compare or findings --exit-code "
    "found differences, a rule would be refused, config check found an error, an Envoy has not confirmed the change, or a drill or the demo failed",
    ExitCode.USAGE: "invalid usage: a wrong option, argument or setting, files that can't be compared, "
    "or output that can't be written",
    ExitCode.UNREACHABLE: "unreachable: the sidecar or a server it needs can't be reached or started, or timed out",
    ExitCode.NOT_FOUND: "not found: no such finding, pair, service or release",
    ExitCode.REFUSED: "the sidecar refused the call or failed",
    ExitCode.INCONCLUSIVE: "the verdict is INCONCLUSIVE: there is too little evidence",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.PIPE_CLOSED: "the reader closed the pipe, as with | head",
}
EXIT_BY_ERROR: tuple[tuple[type[SidecarError], ExitCode], ...] = (
    (SettingError, ExitCode.USAGE),
    (ArgumentError, ExitCode.USAGE),
    (NotFoundError, ExitCode.NOT_FOUND),
    (ServerError, ExitCode.UNREACHABLE),
    (RedisError, ExitCode.UNREACHABLE),
    (LedgerError, ExitCode.UNREACHABLE),
    (SidecarError, ExitCode.REFUSED),
)
OUTPUT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def handle_error(error: BaseException) -> int:
    """Print the error and return its exit code. Re-raise unexpected errors."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return ExitCode.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return ExitCode.PIPE_CLOSED
    if isinstance(error, OSError) and error.errno in OUTPUT_ERRNOS:
        _silence_stdout()
        click.echo(f"abreast: the output can't be written: {error.strerror}", err=True)
        return ExitCode.USAGE
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, SidecarError):
        click.echo(f"abreast: {error}", err=True)
        return next(code for kind, code in EXIT_BY_ERROR if isinstance(error, kind))
    raise error


def _silence_stdout() -> None:
    """Redirect stdout to the null device. Python flushes stdout at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
