"""`abreast up`: everything around two versions that already run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from abreast_sidecar.cli.connection import SidecarClient
from abreast_sidecar.cli.parameters import SHARE_TYPE, ParserParamType
from abreast_sidecar.envoy import settings as envoy
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import ENV_PREFIX, text

if TYPE_CHECKING:
    from abreast_sidecar.embedded.stack import Stack

PREFERRED_REDIS_PORT = 16379  # where it is free, so that services find Redis again in the next run
UPSTREAM_CONNECT_TIMEOUT_S = 1.0  # seconds
SIDECAR_CALL_TIMEOUT_S = 10.0  # seconds
SHARE_OPTIONS = ("sample_safe", "sample_unsafe", "baseline_share")
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def parse_upstream(value: str) -> tuple[envoy.SocketAddress, str]:
    """The endpoint, and the name in its certificate: empty for plain HTTP."""
    expected_text = "a URL such as http://127.0.0.1:8001, without a path"
    parts = urlsplit(value if "://" in value else f"http://{value}")
    try:
        default = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or default
    except (KeyError, ValueError):
        raise ValueError(expected_text) from None
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(expected_text)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return envoy.parse_address(f"{host}:{port}"), parts.hostname if parts.scheme == "https" else ""


UPSTREAM_TYPE = ParserParamType("url", parse_upstream)
LISTENER_TYPE = ParserParamType("[host]:port", envoy.parse_listener)
Upstreams = tuple[tuple[envoy.SocketAddress, str], ...]


@click.command()
@click.option(
    "--old",
    type=UPSTREAM_TYPE,
    multiple=True,
    required=True,
    help="Where the old version runs; may be repeated.",
)
@click.option(
    "--new",
    type=UPSTREAM_TYPE,
    multiple=True,
    required=True,
    help="Where the new version runs; may be repeated.",
)
@click.option(
    "--listen",
    type=LISTENER_TYPE,
    default="127.0.0.1:8080",
    show_default=True,
    help="Where users' requests arrive; :8080 means all addresses.",
)
@click.option(
    "--service",
    type=ParserParamType("name", text),
    default="service",
    show_default=True,
    help="The service's name, as in the middleware.",
)
@click.option(
    "--sample",
    "sample_safe",
    type=SHARE_TYPE,
    default="100%",
    show_default=True,
    help="Share of GET, HEAD and OPTIONS requests that are mirrored.",
)
@click.option(
    "--sample-unsafe",
    type=SHARE_TYPE,
    default="0%",
    show_default=True,
    help="Share of other requests that are mirrored: both versions do them!",
)
@click.option(
    "--baseline",
    "baseline_share",
    type=SHARE_TYPE,
    default="10%",
    show_default=True,
    help="Share of the mirrored safe requests that old gets twice, to learn what is noise.",
)
@click.option(
    "--health-path",
    type=ParserParamType("path", envoy.parse_health_check),
    default="/healthz",
    show_default=True,
    help="What Envoy asks new once a second; any answer below 500 is healthy. tcp: only connect.",
)
@click.option(
    "--sticky",
    type=ParserParamType("what", envoy.parse_sticky),
    default=None,
    help="What keeps a user on one version: header:NAME, cookie:NAME or source-ip.",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps what was compared; without it nothing is kept.",
)
@click.option(
    "--grpc",
    type=LISTENER_TYPE,
    default="127.0.0.1:50051",
    show_default=True,
    help="Address of the sidecar's gRPC.",
)
@click.option(
    "--http",
    type=LISTENER_TYPE,
    default="127.0.0.1:8090",
    show_default=True,
    help="Address of the sidecar's HTTP: metrics and health.",
)
@click.pass_context
def up_command(
    ctx: click.Context,
    /,
    old: Upstreams,
    new: Upstreams,
    data: Path | None,
    grpc: envoy.SocketAddress,
    http: envoy.SocketAddress,
    **envoy_options: object,
) -> None:
    """Start Envoy, Redis, Postgres and the sidecar for two versions that already run.

    Says what to set in them. Stops everything it started at Ctrl-C or SIGTERM.
    """
    from abreast_sidecar.cli.guide import format_startup_message
    from abreast_sidecar.cli.lookout import StackMonitor
    from abreast_sidecar.embedded.stack import Stack

    stack = Stack(
        build_envoy_settings(old, new, envoy_options),
        data=data,
        grpc=grpc,
        http=http,
        redis_port=PREFERRED_REDIS_PORT,
        settings={name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)},
        report=lambda line: click.echo(f"  {line}"),
    )
    with contextlib.suppress(KeyboardInterrupt), signals_as_interrupts(), stack:
        try:
            apply_requested_shares(ctx, stack)
            click.echo(format_startup_message(stack, data))
            warn_of_unreachable_upstreams({"old": old, "new": new})
            StackMonitor(stack).run()
        finally:
            ignore_termination_signals()  # stopping takes a moment, and must not be cut short
            click.echo("\nstopping")


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM, and a terminal that closes, do what Ctrl-C does. A shell's `&` has SIGINT ignored, which is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATION_SIGNALS)}
    for number, handler in handlers.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # ignored as nohup wants it
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_termination_signals() -> None:
    for number in (signal.SIGINT, *TERMINATION_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def build_envoy_settings(old: Upstreams, new: Upstreams, options: dict[str, object]) -> envoy.EnvoySettings:
    tls_names = {}
    for version, upstreams in (("old", old), ("new", new)):
        server_names = {name for _endpoint, name in upstreams}
        if len(server_names) > 1:
            raise SettingError(
                f"--{version}: all endpoints of a version must have the same scheme and name for https"
            )
        tls_names[f"{version}_tls"] = server_names.pop()
    options = {name: value for name, value in options.items() if value is not None}
    upstream_endpoints = {
        "old": tuple(endpoint for endpoint, _ in old),
        "new": tuple(endpoint for endpoint, _ in new),
    }
    return envoy.EnvoySettings(**upstream_endpoints, **tls_names, **options)  # type: ignore[arg-type]  # the options' names are the fields'


def apply_requested_shares(ctx: click.Context, stack: Stack) -> None:
    """What is asked for on the command line also holds where the data folder remembers something else."""
    from abreast.v1 import traffic_pb2 as api

    requested_shares = {
        name: ctx.params[name]
        for name in SHARE_OPTIONS
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if not requested_shares:
        return
    service = stack.envoy_settings.service
    request = api.UpdateTrafficRequest(
        service=service, actor="abreast up", reason="options of abreast up", **requested_shares
    )
    link = SidecarClient(stack.grpc_address, SIDECAR_CALL_TIMEOUT_S)
    traffic = link.call(
        lambda calls: calls.traffic.GetTraffic(
            api.GetTrafficRequest(service=service), timeout=calls.timeout_s
        )
    ).traffic
    if any(abs(getattr(traffic, name) - share) > 1e-6 for name, share in requested_shares.items()):
        link.call(lambda calls: calls.traffic.UpdateTraffic(request, timeout=calls.timeout_s))


def warn_of_unreachable_upstreams(versions: dict[str, Upstreams]) -> None:
    for version, upstreams in versions.items():
        for endpoint, _name in upstreams:
            try:
                socket.create_connection(
                    (endpoint.host, endpoint.port), timeout=UPSTREAM_CONNECT_TIMEOUT_S
                ).close()
            except OSError:
                click.echo(
                    f"{version} does not answer at {endpoint.host}:{endpoint.port} yet; it is used as soon as it does",
                    err=True,
                )
