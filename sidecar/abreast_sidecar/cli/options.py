"""Option types (shares, times, addresses, enums) and the options that commands share."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import getpass
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click
from click.shell_completion import CompletionItem

from abreast.settings import DeclaredSettings
from abreast_sidecar import settings
from abreast_sidecar.client.sidecar_client import Calls, PageT, RequestT, Response, SidecarClient, build_time_window
from abreast_sidecar.errors import SettingError

if TYPE_CHECKING:
    from abreast.v1.comparison_pb2 import Budget
    from abreast_sidecar.client.output import Console

SECONDS_PER_UNIT = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
MAX_SPAN = dt.timedelta(days=36_525)
SPAN_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)")
MIN_ROUNDED_AGE = dt.timedelta(hours=6)
DEFAULT_ADDRESS = "127.0.0.1:50051"

Command = TypeVar("Command", bound=Callable[..., Any])
SettingsClass = TypeVar("SettingsClass", bound=DeclaredSettings)


class ParserParamType(click.ParamType[Any]):
    """Option type that converts text with `parse`, whose ValueError describes the expected form."""

    def __init__(self, name: str, parse: Callable[[str], Any], choices: Iterable[str] = ()) -> None:
        self.name = name
        self.parse = parse
        self.choices = tuple(choices)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:  # noqa: ARG002  # click's signature
        return f"[{'|'.join(self.choices)}]" if self.choices else None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        return [CompletionItem(choice) for choice in self.choices if choice.startswith(incomplete.lower())]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(f"must be {error}, got {settings.mask_passwords(value)!r}", param, ctx)


def parse_span(value: str) -> dt.timedelta:
    """Return the length of a span such as `10m`."""
    with contextlib.suppress(OverflowError):
        if match := SPAN_PATTERN.fullmatch(value.strip()):
            span = dt.timedelta(seconds=float(match[1]) * SECONDS_PER_UNIT[match[2]])
            if span <= MAX_SPAN:
                return span
    raise ValueError("a span such as 30s, 10m or 1h, of at most 100 years")


def parse_moment(value: str) -> dt.datetime:
    """Convert a span such as `15m` to the time that long ago, or read a time. A time without a zone is local."""
    text = value.strip()
    current_time = dt.datetime.now(dt.UTC)
    try:
        if SPAN_PATTERN.fullmatch(text):
            return current_time - parse_span(text)
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


def enum_type(enum: Any) -> ParserParamType:
    """Return the option type for an enum of the API, with short names such as `breaking` for IMPACT_BREAKING."""
    numbers_by_name = {name.partition("_")[2].lower(): number for name, number in enum.items() if number}

    def parse_name(value: str) -> int:
        if (number := numbers_by_name.get(value.lower())) is None:
            raise ValueError(f"one of {', '.join(numbers_by_name)}")
        return int(number)

    return ParserParamType("name", parse_name, numbers_by_name)


SHARE_TYPE = ParserParamType("share", settings.share)
EXCESS_TYPE = ParserParamType("share", parse_excess)


class Audit(TypedDict):
    """The fields of a request that the audit log stores."""

    actor: str
    reason: str


@dataclass(frozen=True)
class PrintingClient(SidecarClient):
    """A client that prints responses as JSON for scripts, or as text for people."""

    as_json: bool

    def show(
        self, operation: Callable[[Calls], Awaitable[Response]], print_text: Callable[[Console, Response], None]
    ) -> Response:
        """Make a call, print its response and return it."""
        return self._print(self.call(operation), print_text)

    def show_rows(
        self,
        method: Callable[[Calls], Callable[[RequestT], Awaitable[PageT]]],
        request: RequestT,
        limit: int,
        print_text: Callable[[Console, PageT], None],
    ) -> PageT:
        """Call a List method for up to `limit` rows, print them and return the response."""
        return self._print(self.list_rows(method, request, limit), print_text)

    def _print(self, response: Response, print_text: Callable[[Console, Response], None]) -> Response:
        from abreast_sidecar.client.output import make_console, print_json  # slow to import

        if self.as_json:
            print_json(response)
        else:
            out = make_console()
            print_text(out, response)
            if out.is_terminal:
                out.print(f"sidecar {self.address}", style="dim")
        return response


def option_group(parameter: str, build: Callable[..., Any], **options: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds `options`, and passes `build(**values)` to the command as one parameter.

    The keywords of `options` are the names of the values. An option can also be a group.
    """

    def add_options(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_group(*args: Any, **values: Any) -> Any:
            group_values = {name: values.pop(name) for name in options}
            return command(*args, **values, **{parameter: build(**group_values)})

        return combine_options(*options.values())(with_group)

    return add_options


def combine_options(*options: Callable[..., Any]) -> Callable[[Command], Command]:
    """Return a decorator that adds all `options`, in this order."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def build_budget(**limits: float | None) -> Budget:
    from abreast.v1 import comparison_pb2

    return comparison_pb2.Budget(**{name: limit for name, limit in limits.items() if limit is not None})


def find_sidecar(address: str | None) -> str:
    """Return the address of an option or a variable, else of the only run of `abreast up` or `abreast demo`.

    If there are several runs, ask a person, and fail without a terminal.
    """
    if address is not None:
        return address
    if click.get_current_context().invoked_subcommand is not None:
        return DEFAULT_ADDRESS  # a group makes no call: its subcommand has the option too
    from abreast_sidecar.stack.data import list_runs  # slow to import

    addresses = list_runs()
    if len(addresses) < 2:
        return addresses[0] if addresses else DEFAULT_ADDRESS
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SettingError(f"several stacks run: {', '.join(addresses)}; choose one with --address or ABREAST_SIDECAR")
    choice: str = click.prompt("Several stacks run. Which one?", type=click.Choice(addresses), err=True)
    return choice


def build_client(client: Callable[..., SidecarClient], address: str | None, **values: Any) -> SidecarClient:
    return client(address=find_sidecar(address), **values)


def build_audit(reason: str, actor: str | None) -> Audit:
    return Audit(actor=default_actor(actor), reason=reason)


def default_actor(actor: str | None) -> str:
    if actor is not None:
        return actor
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


budget_options = option_group(
    "budget",
    build_budget,
    max_mismatch=click.option(
        "--max-mismatch", type=SHARE_TYPE, help="Allowed share of pairs with unexplained mismatches.  [default: 0.1%]"
    ),
    max_error=click.option(
        "--max-error", type=SHARE_TYPE, help="Allowed share of pairs in which only new fails.  [default: 0.1%]"
    ),
    max_slower=click.option(
        "--max-slower", type=EXCESS_TYPE, help="Allowed slowdown of new in the median pair.  [default: 10%]"
    ),
    min_completeness=click.option(
        "--min-completeness",
        type=SHARE_TYPE,
        help="Required share of sampled requests that are accounted for.  [default: 99%]",
    ),
    confidence=click.option("--confidence", type=SHARE_TYPE, help="Confidence of the verdict.  [default: 95%]"),
    max_blind=click.option(
        "--max-blind",
        type=SHARE_TYPE,
        help="Allowed share of pairs in which noise at one place may hide a regression.  [default: no limit]",
    ),
)
since_option = click.option(
    "--since",
    type=ParserParamType("when", parse_window_start),
    help="Include requests since this time: 15m, 1h or 2d ago, or a time such as 2026-01-31T09:30. "
    "A span of 6h or more starts at the full hour.",
)
until_option = click.option(
    "--until", type=ParserParamType("when", parse_moment), help="Include requests before this time."
)
window_options = option_group("window", build_time_window, since=since_option, until=until_option)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Maximum number of rows."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
service_option = click.option("--service", default="", help="Name of the service.  [default: the only service]")
endpoint_options = combine_options(
    click.option(
        "--method",
        default="",
        callback=lambda _ctx, _param, method: method.upper(),
        help="Only this method, such as GET.",
    ),
    click.option("--route", default="", help="Only this route template, such as /products/{id}."),
)
actor_option = click.option("--actor", default=None, help="Actor for the audit log.  [default: user@host]")
audit_options = option_group(
    "audit",
    build_audit,
    reason=click.option("--reason", required=True, help="Reason for the audit log."),
    actor=actor_option,
)
address_option = click.option(
    "--address",
    type=ParserParamType("host:port", parse_target),
    default=None,
    envvar="ABREAST_SIDECAR",
    show_envvar=True,
    help=f"gRPC address of the sidecar.  [default: the running stack, else {DEFAULT_ADDRESS}]",
)
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=ParserParamType("seconds", settings.seconds),
    default=10.0,
    show_default=True,
    help="Time limit of a call in seconds.",
)
connection_options = option_group(
    "link", functools.partial(build_client, SidecarClient), address=address_option, timeout_s=timeout_option
)
api_options = option_group(
    "link",
    functools.partial(build_client, PrintingClient),
    as_json=json_option,
    address=address_option,
    timeout_s=timeout_option,
)
force_option = click.option("--force", is_flag=True, help="Send more users to new even if the verdict is FAIL.")
change_options = combine_options(audit_options, service_option, api_options)


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the services, such as abreast.yaml.  [default: options and variables, for one service]",
)


def setting_options(
    settings_class: type[DeclaredSettings],
    *,
    secrets: bool = False,
    without: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Add an option for each setting, except those in `without`. `aliases` are second names of options by setting.

    Secrets are left out by default: `ps` would show them.
    """

    def add_options(command: Command) -> Command:
        for declared in reversed(settings_class.declared()):
            if (declared.secret and not secrets) or declared.name in without:
                continue
            help_text = f"{declared.doc}.  [{declared.variable}; default: {declared.default_text or 'none'}]"
            if isinstance(declared.default, bool):
                switch = f"{declared.option}/{declared.option.replace('--', '--no-', 1)}"
                click.option(switch, declared.name, default=None, help=help_text)(command)
            else:
                names = [declared.option, *([aliases[declared.name]] if aliases and declared.name in aliases else [])]
                is_repeatable = bool(declared.repeatable)
                click.option(*names, declared.name, metavar="VALUE", multiple=is_repeatable, help=help_text)(command)
        return command

    return add_options


def read_settings(
    settings_class: type[SettingsClass], options: dict[str, Any], environment: Mapping[str, str] = os.environ
) -> SettingsClass:
    """Read settings from options, and from variables if there is no option. Errors name the option."""
    overridden = [declared for declared in settings_class.declared() if options.get(declared.name) not in {None, ()}]
    overrides = {
        declared.variable: declared.repeatable.join(options[declared.name])
        if declared.repeatable
        else str(options[declared.name])
        for declared in overridden
    }
    try:
        return settings_class.from_environment({**environment, **overrides})
    except SettingError as error:
        message = str(error)
        for declared in overridden:
            message = re.sub(rf"\b{declared.variable}\b", declared.option, message)
        raise SettingError(message) from error


def warn_of_unused_variables(*used: str) -> None:
    """Name the ABREAST_* variables that a command ignores, because a user may rely on one."""
    if unused := sorted(name for name in os.environ if name.startswith(settings.ENV_PREFIX) and name not in used):
        click.echo(f"abreast: this command does not use {', '.join(unused)}", err=True)
