"""How commands end: one line on stderr, and a code that scripts can rely on."""

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


class Exit(enum.IntEnum):
    OK = 0
    NO = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    INTERRUPTED = 130
    PIPE_CLOSED = 141


UNWRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
EXITS = {
    Exit.OK: "done",
    Exit.NO: "done, and the answer is no: doctor found a failure, verdict says FAIL, compare or findings --exit-code found something, rules preview or import --dry-run found what speaks against a rule, or not every Envoy has a change yet",
    Exit.USAGE: "a wrong option, argument or setting; files that can't be compared; verdict says INCONCLUSIVE; or the output can't be written",
    Exit.UNREACHABLE: "the sidecar, or a server it needs, can't be reached or started, or took too long",
    Exit.NOT_FOUND: "no such finding, pair or service",
    Exit.REFUSED: "the sidecar refused, or failed",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
    Exit.PIPE_CLOSED: "whoever read the output left, as with | head",
}


class RefusedError(SidecarError):
    """The sidecar answered a call with an error that is none of the others."""


CODES: tuple[tuple[type[SidecarError], Exit], ...] = (
    (SettingError, Exit.USAGE),
    (ArgumentError, Exit.USAGE),
    (NotFoundError, Exit.NOT_FOUND),
    (ServerError, Exit.UNREACHABLE),
    (RedisError, Exit.UNREACHABLE),
    (LedgerError, Exit.UNREACHABLE),
    (SidecarError, Exit.REFUSED),
)


def ended_by(error: BaseException) -> int:
    """Say what is to be said of the error, and return the exit code. Errors that nobody foresaw are raised again."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Exit.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return Exit.PIPE_CLOSED
    if isinstance(error, OSError) and error.errno in UNWRITTEN:
        _silence_stdout()
        click.echo(f"abreast: the output can't be written: {error.strerror}", err=True)
        return Exit.USAGE
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, SidecarError):
        click.echo(f"abreast: {error}", err=True)
        return next(code for kind, code in CODES if isinstance(error, kind))
    raise error


def _silence_stdout() -> None:
    """Python flushes stdout when it ends, and would complain then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
