"""`abreast token`, `abreast key` and `abreast audit`: tokens of callers, keys, and the log of changes and looks at bodies."""

from __future__ import annotations

import datetime as dt
import secrets
from pathlib import Path

import click

from abreast.settings import RedactionKeys
from abreast.v1 import access_pb2 as api
from abreast.v1.common_pb2 import TimeWindow
from abreast_sidecar.cli.options import (
    ParserParamType,
    PrintingClient,
    actor_option,
    address_option,
    api_options,
    default_actor,
    enum_type,
    find_sidecar,
    limit_option,
    parse_span,
    window_options,
)
from abreast_sidecar.client.output import (
    Console,
    enum_name,
    format_local_time,
    make_table,
    print_list,
    style_text,
    to_printable,
)
from abreast_sidecar.errors import SettingError


@click.group()
def token_command() -> None:
    """Manage the tokens of callers."""


@token_command.command("create")
@click.argument("name")
@click.option(
    "--scope", "scopes", type=enum_type(api.Scope), multiple=True, required=True, help="A right (repeatable)."
)
@click.option("--service", "services", multiple=True, help="Valid for this service (repeatable).  [default: all]")
@click.option("--node", default="", help="Node id of the only Envoy that may use it.  [default: any]")
@click.option(
    "--expires", type=ParserParamType("span", parse_span), help="Valid for this span, such as 90d.  [default: no end]"
)
@actor_option
@api_options
def create_command(
    link: PrintingClient,
    name: str,
    scopes: tuple[int, ...],
    services: tuple[str, ...],
    node: str,
    expires: dt.timedelta | None,
    actor: str | None,
) -> None:
    """Create a token and print its secret, which is not stored.

    NAME becomes the actor of all changes with this token. It can't be used again.
    """
    request = api.CreateTokenRequest(name=name, services=services, node=node, actor=default_actor(actor))
    request.scopes.extend(scopes)  # type: ignore[arg-type]  # numbers of the enum
    if expires is not None:
        request.expire_time.FromDatetime(dt.datetime.now(dt.UTC) + expires)

    def print_secret(_: Console, response: api.CreateTokenResponse) -> None:
        click.echo(response.secret)
        click.echo(f"abreast: this is the only time that the secret of {response.token.name} is shown", err=True)

    link.show(lambda calls: calls.access.CreateToken(request), print_secret)


@token_command.command("list")
@limit_option
@api_options
def list_command(link: PrintingClient, limit: int) -> None:
    """List the tokens, newest first."""
    link.show_rows(lambda calls: calls.access.ListTokens, api.ListTokensRequest(), limit, _print_tokens)


def _print_tokens(out: Console, response: api.ListTokensResponse) -> None:
    table = make_table("name", "scopes", "services", "created by", "state")
    for token in response.tokens:
        scopes = ", ".join(enum_name(api.Scope, scope) for scope in token.scopes)
        table.add_row(
            to_printable(token.name),
            scopes,
            to_printable(", ".join(token.services) or "all"),
            to_printable(token.creator),
            _format_state(token),
        )
    print_list(out, response, response.tokens, table, empty="no tokens")


def _format_state(token: api.Token) -> str:
    if token.HasField("revoke_time"):
        return f"revoked {format_local_time(token.revoke_time)}"
    if not token.HasField("expire_time"):
        return "valid"
    is_expired = token.expire_time.ToDatetime(dt.UTC) <= dt.datetime.now(dt.UTC)
    return f"{'expired' if is_expired else 'valid until'} {format_local_time(token.expire_time)}"


@token_command.command("revoke")
@click.argument("name")
@actor_option
@api_options
def revoke_command(link: PrintingClient, name: str, actor: str | None) -> None:
    """Revoke a token on all sidecars."""
    request = api.RevokeTokenRequest(name=name, actor=default_actor(actor))

    def print_revoked(out: Console, response: api.RevokeTokenResponse) -> None:
        out.print(style_text(f"{to_printable(response.token.name)} is revoked", "ok"))

    link.show(lambda calls: calls.access.RevokeToken(request), print_revoked)


@click.group()
def key_command() -> None:
    """Rotate the key of the hashes that replace secrets in captures."""


@key_command.command("rotate")
@click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, resolve_path=True, path_type=Path),
    envvar="ABREAST_REDACT_KEY_FILE",
    show_envvar=True,
    help="File with the key.  [default: that of the running stack]",
)
@click.option(
    "--after",
    type=ParserParamType("span", parse_span),
    default="1m",
    show_default=True,
    help="Span until the new key is used, in which all processes must read the file.",
)
@address_option
def rotate_command(path: Path | None, after: dt.timedelta, address: str | None) -> None:
    """Add a new key to the file of ABREAST_REDACT_KEY_FILE.

    Services, sidecars and collectors read the file every five seconds, and use the new key at the same time.
    """
    from abreast_sidecar.stack.data import KEY_BYTES, REDACTION_KEY_VARIABLE, find_run, write_secret

    if path is None:
        run_file = find_run(find_sidecar(address)).get(REDACTION_KEY_VARIABLE)
        if run_file is None:
            raise SettingError("no stack of `abreast up` runs; name the file with --file or ABREAST_REDACT_KEY_FILE")
        path = Path(run_file)
    now = dt.datetime.now(dt.UTC)
    try:
        keys = RedactionKeys.parse(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingError(f"--file must have a key that can be rotated: {path}: {error}") from None
    if keys.next_key and now.timestamp() < keys.next_from:
        start = dt.datetime.fromtimestamp(keys.next_from).astimezone()
        raise SettingError(f"{path} already has a key for {start:%Y-%m-%d %H:%M:%S}; rotate it again after that")
    start = (now + after).replace(microsecond=0)
    key = keys.next_key or keys.key
    try:
        write_secret(path, f"{key},{secrets.token_hex(KEY_BYTES)}@{start:%Y-%m-%dT%H:%M:%SZ}")
    except OSError as error:
        raise SettingError(f"--file can't be written: {error.strerror}: {path}") from error
    click.echo(f"requests from {start.astimezone():%Y-%m-%d %H:%M:%S} on are hashed with a new key of {path}")


@click.command
@click.option("--actor", default="", help="Only entries of this actor.  [default: all]")
@window_options
@limit_option
@api_options
def audit_command(link: PrintingClient, window: TimeWindow | None, actor: str, limit: int) -> None:
    """List changes and looks at bodies, newest first."""
    request = api.ListAuditEventsRequest(window=window, actor_filter=actor)
    link.show_rows(lambda calls: calls.access.ListAuditEvents, request, limit, _print_events)


def _print_events(out: Console, response: api.ListAuditEventsResponse) -> None:
    table = make_table("time", "actor", "from", "action", "service", "target")
    for event in response.events:
        texts = (event.actor, event.peer, event.action, event.service, event.target)
        table.add_row(format_local_time(event.time), *map(to_printable, texts))
    print_list(out, response, response.events, table, empty="no entries")
