"""Option types (shares, times, addresses, enums) and the options that commands share."""

from __future__ import annotations

import datetime as dt
import functools
import getpass
import os
import re
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import click

from abreast.settings import DeclaredSettings
from abreast_sidecar import settings
from abreast_sidecar.client.sidecar_client import SidecarClient
from abreast_sidecar.errors import SettingError

SECONDS_PER_UNIT = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
SPAN_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)")
MIN_ROUNDED_AGE = dt.timedelta(hours=6)
DEFAULT_ADDRESS = "127.0.0.1:50051"

Command = TypeVar("Command", bound=Callable[..., Any])


class ParserParamType(click.ParamType[Any]):
    """Option type that converts text with `parse`, whose ValueError describes the expected form."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(f"must be {error}, got {settings.mask_passwords(value)!r}", param, ctx)


def parse_moment(value: str) -> dt.datetime:
    """Convert a span such as `15m` to the time that long ago, or read a time. A time without a zone is local."""
    text = value.strip()
    match = SPAN_PATTERN.fullmatch(text)
    current_time = dt.datetime.now(dt.UTC)
    try:
        if match:
            return current_time - dt.timedelta(seconds=float(match[1]) * SECONDS_PER_UNIT[match[2]])
        return current_time if text == "now" else dt.datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise ValueError("a span such as 90s, 15m, 1h or 2d, or a time such as 2026-01-31T09:30") from error


def parse_window_start(value: str) -> dt.datetime:
    """Parse as `parse_moment`, and round a span of six hours or more down to the full hour.

    The ledger has totals of full hours, so that such a window is fast to read.
    """
    start = parse_moment(value)
    if SPAN_PATTERN.fullmatch(value.strip()) and dt.datetime.now(dt.UTC) - start >= MIN_ROUNDED_AGE:
        return start.replace(minute=0, second=0, microsecond=0)
    return start


def parse_span(value: str) -> float:
    """Return the seconds of a span such as `10m`."""
    match = SPAN_PATTERN.fullmatch(value.strip())
    if not match:
        raise ValueError("a span such as 30s, 10m or 1h")
    return float(match[1]) * SECONDS_PER_UNIT[match[2]]


def parse_excess(value: str) -> float:
    """Return an excess as a share: `250%` is 2.5."""
    text = value.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise ValueError("a share of 0% or more, such as 25%, 0.25 or 250%")
    return share


def parse_target(value: str) -> str:
    """Check the host:port of a sidecar."""
    text = value.strip()
    host, colon, port = text.rpartition(":")
    if "/" in text or not host or not colon or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError("the host:port of a sidecar's gRPC, such as 127.0.0.1:50051")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("an address such as [::1]:50051")
    return text


class EnumParamType(click.ParamType[int]):
    """Option type for an enum of the API with short names, such as `breaking` for IMPACT_BREAKING."""

    def __init__(self, enum: str) -> None:
        self.enum = enum
        self.name = enum.lower()

    def _numbers_by_name(self) -> dict[str, int]:
        from abreast.v1 import common_pb2

        members = getattr(common_pb2, self.enum.capitalize()).items()
        return {name.partition("_")[2].lower(): number for name, number in members if number}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        numbers_by_name = self._numbers_by_name()
        number = numbers_by_name.get(str(value).lower())
        if number is None:
            self.fail(f"must be one of {', '.join(numbers_by_name)}, got {value!r}", param, ctx)
        return number

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002  # click's signature
        return "[" + "|".join(self._numbers_by_name()) + "]"


SHARE_TYPE = ParserParamType("share", settings.share)
MOMENT_TYPE = ParserParamType("when", parse_moment)
WINDOW_START_TYPE = ParserParamType("when", parse_window_start)
TARGET_TYPE = ParserParamType("host:port", parse_target)
SECONDS_TYPE = ParserParamType("seconds", settings.seconds)
EXCESS_TYPE = ParserParamType("share", parse_excess)
SPAN_TYPE = ParserParamType("span", parse_span)

since_option = click.option(
    "--since",
    type=WINDOW_START_TYPE,
    help="Include requests since this time: 15m, 1h or 2d ago, or a time such as 2026-01-31T09:30. "
    "A span of 6h or more starts at the full hour.",
)
until_option = click.option("--until", type=MOMENT_TYPE, help="Include requests before this time.")
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Maximum number of rows."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
service_option = click.option("--service", default="", help="Name of the service.  [default: the only service]")
reason_option = click.option("--reason", required=True, help="Reason for the audit log.")
actor_option = click.option("--actor", default=None, help="Actor for the audit log.  [default: user@host]")
address_option = click.option(
    "--address",
    type=TARGET_TYPE,
    default=DEFAULT_ADDRESS,
    envvar="ABREAST_SIDECAR",
    show_default=True,
    show_envvar=True,
    help="gRPC address of the sidecar.",
)
timeout_option = click.option(
    "--timeout", type=SECONDS_TYPE, default=10.0, show_default=True, help="Time limit of a call in seconds."
)
SettingsClass = TypeVar("SettingsClass", bound=DeclaredSettings)


def connection_options(command: Command) -> Command:
    """Add the options --address and --timeout, and pass them to the command as `link`."""

    @functools.wraps(command)
    def with_link(*args: Any, address: str, timeout: float, **kwargs: Any) -> Any:
        return command(*args, link=SidecarClient(address, timeout), **kwargs)

    return address_option(timeout_option(with_link))  # type: ignore[return-value]  # the command with two more options


def setting_options(settings_class: type[DeclaredSettings], *, secrets: bool = False) -> Callable[[Command], Command]:
    """Add an option for each setting. Secrets are left out by default: `ps` would show them."""

    def add_options(command: Command) -> Command:
        for declared in reversed(settings_class.declared()):
            if declared.secret and not secrets:
                continue
            help_text = f"{declared.doc}.  [{declared.variable}; default: {declared.default_text or 'none'}]"
            if isinstance(declared.default, bool):
                switch = f"{declared.option}/{declared.option.replace('--', '--no-', 1)}"
                click.option(switch, declared.name, default=None, help=help_text)(command)
            else:
                click.option(declared.option, declared.name, metavar="VALUE", help=help_text)(command)
        return command

    return add_options


def read_settings(settings_class: type[SettingsClass], options: dict[str, Any]) -> SettingsClass:
    """Read settings from options, and from variables if there is no option. Errors name the option."""
    given = {
        declared: options[declared.name]
        for declared in settings_class.declared()
        if options.get(declared.name) is not None
    }
    overrides = {declared.variable: str(value) for declared, value in given.items()}
    try:
        return settings_class.from_environment({**os.environ, **overrides})
    except SettingError as error:
        message = str(error)
        for declared in given:
            message = re.sub(rf"\b{declared.variable}\b", declared.option, message)
        raise SettingError(message) from error


def default_actor(actor: str | None) -> str:
    if actor is not None:
        return actor
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
