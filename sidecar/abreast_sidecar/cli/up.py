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

from abreast_sidecar.cli.connection import Link
from abreast_sidecar.cli.parameters import SHARE, Parsed
from abreast_sidecar.envoy import settings as envoy
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import PREFIX, text

if TYPE_CHECKING:
    from abreast_sidecar.embedded.stack import Stack

REDIS_PORT = 16379  # where it is free, so that services find Redis again in the next run
CONNECT_TIMEOUT = 1.0  # seconds
CALL_TIMEOUT = 10.0  # seconds
SHARES = ("sample_safe", "sample_unsafe", "baseline_share")
ENDING = (signal.SIGTERM, signal.SIGHUP)


def upstream(value: str) -> tuple[envoy.Endpoint, str]:
    """The endpoint, and the name in its certificate: empty for plain HTTP."""
    wanted = "a URL such as http://127.0.0.1:8001, without a path"
    parts = urlsplit(value if "://" in value else f"http://{value}")
    try:
        default = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or default
    except (KeyError, ValueError):
        raise ValueError(wanted) from None
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(wanted)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return envoy.endpoint(f"{host}:{port}"), parts.hostname if parts.scheme == "https" else ""


UPSTREAM = Parsed("url", upstream)
LISTENER = Parsed("[host]:port", envoy.listener)
Upstreams = tuple[tuple[envoy.Endpoint, str], ...]


@click.command()
@click.option(
    "--old", type=UPSTREAM, multiple=True, required=True, help="Where the old version runs; may be repeated."
)
@click.option(
    "--new", type=UPSTREAM, multiple=True, required=True, help="Where the new version runs; may be repeated."
)
@click.option(
    "--listen",
    type=LISTENER,
    default="127.0.0.1:8080",
    show_default=True,
    help="Where users' requests arrive; :8080 means all addresses.",
)
@click.option(
    "--service",
    type=Parsed("name", text),
    default="service",
    show_default=True,
    help="The service's name, as in the middleware.",
)
@click.option(
    "--sample",
    "sample_safe",
    type=SHARE,
    default="100%",
    show_default=True,
    help="Share of GET, HEAD and OPTIONS requests that are mirrored.",
)
@click.option(
    "--sample-unsafe",
    type=SHARE,
    default="0%",
    show_default=True,
    help="Share of other requests that are mirrored: both versions do them!",
)
@click.option(
    "--baseline",
    "baseline_share",
    type=SHARE,
    default="10%",
    show_default=True,
    help="Share of the mirrored safe requests that old gets twice, to learn what is noise.",
)
@click.option(
    "--health-path",
    type=Parsed("path", envoy.health),
    default="/healthz",
    show_default=True,
    help="What Envoy asks new once a second; any answer below 500 is healthy. tcp: only connect.",
)
@click.option(
    "--sticky",
    type=Parsed("what", envoy.sticky),
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
    type=LISTENER,
    default="127.0.0.1:50051",
    show_default=True,
    help="Address of the sidecar's gRPC.",
)
@click.option(
    "--http",
    type=LISTENER,
    default="127.0.0.1:8090",
    show_default=True,
    help="Address of the sidecar's HTTP: metrics and health.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    old: Upstreams,
    new: Upstreams,
    data: Path | None,
    grpc: envoy.Endpoint,
    http: envoy.Endpoint,
    **envoy_values: object,
) -> None:
    """Start Envoy, Redis, Postgres and the sidecar for two versions that already run.

    Says what to set in them. Stops everything it started at Ctrl-C or SIGTERM.
    """
    from abreast_sidecar.cli.guide import guide
    from abreast_sidecar.cli.lookout import Lookout
    from abreast_sidecar.embedded.stack import Stack

    stack = Stack(
        envoy_settings(old, new, envoy_values),
        data=data,
        grpc=grpc,
        http=http,
        redis_port=REDIS_PORT,
        settings={name: value for name, value in os.environ.items() if name.startswith(PREFIX)},
        say=lambda line: click.echo(f"  {line}"),
    )
    with contextlib.suppress(KeyboardInterrupt), ended_by_signals(), stack:
        try:
            set_shares(ctx, stack)
            click.echo(guide(stack, data))
            warn_of_silent({"old": old, "new": new})
            Lookout(stack).watch()
        finally:
            ignore_signals()  # stopping takes a moment, and must not be cut short
            click.echo("\nstopping")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and a terminal that closes, do what Ctrl-C does. A shell's `&` has SIGINT ignored, which is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    for number, handler in before.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # ignored as nohup wants it
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    for number in (signal.SIGINT, *ENDING):
        signal.signal(number, signal.SIG_IGN)


def envoy_settings(old: Upstreams, new: Upstreams, values: dict[str, object]) -> envoy.EnvoySettings:
    names = {}
    for version, upstreams in (("old", old), ("new", new)):
        found = {name for _endpoint, name in upstreams}
        if len(found) > 1:
            raise SettingError(
                f"--{version}: all endpoints of a version must have the same scheme and name for https"
            )
        names[f"{version}_tls"] = found.pop()
    values = {name: value for name, value in values.items() if value is not None}
    both = {"old": tuple(one for one, _ in old), "new": tuple(one for one, _ in new)}
    return envoy.EnvoySettings(**both, **names, **values)  # type: ignore[arg-type]  # the options' names are the fields'


def set_shares(ctx: click.Context, stack: Stack) -> None:
    """What is asked for on the command line also holds where the data folder remembers something else."""
    from abreast.v1 import traffic_pb2 as api

    asked = {
        name: ctx.params[name]
        for name in SHARES
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if not asked:
        return
    service = stack.envoy_settings.service
    request = api.UpdateTrafficRequest(
        service=service, actor="abreast up", reason="options of abreast up", **asked
    )
    link = Link(stack.grpc_address, CALL_TIMEOUT)
    traffic = link.run(
        lambda calls: calls.traffic.GetTraffic(api.GetTrafficRequest(service=service), timeout=calls.timeout)
    ).traffic
    if any(abs(getattr(traffic, name) - share) > 1e-6 for name, share in asked.items()):
        link.run(lambda calls: calls.traffic.UpdateTraffic(request, timeout=calls.timeout))


def warn_of_silent(versions: dict[str, Upstreams]) -> None:
    for version, upstreams in versions.items():
        for endpoint, _name in upstreams:
            try:
                socket.create_connection((endpoint.host, endpoint.port), timeout=CONNECT_TIMEOUT).close()
            except OSError:
                click.echo(
                    f"{version} does not answer at {endpoint.host}:{endpoint.port} yet; it is used as soon as it does",
                    err=True,
                )
