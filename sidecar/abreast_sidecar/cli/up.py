"""`abreast up`: Envoy, Redis, Postgres and the sidecar for two versions that already run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import redis
from click.core import ParameterSource
from redis.backoff import NoBackoff
from redis.retry import Retry

from abreast.protocol import join
from abreast_sidecar.cli.doctor import UnreachableError
from abreast_sidecar.cli.doctor.envoy import EnvoyFacts, read_envoy_facts
from abreast_sidecar.cli.doctor.redis import parse_report
from abreast_sidecar.cli.doctor.services import ServiceProcess
from abreast_sidecar.cli.options import DEFAULT_ADDRESS, SHARE_TYPE, ParserParamType
from abreast_sidecar.client.output import format_percent, to_printable
from abreast_sidecar.client.sidecar_client import SidecarClient
from abreast_sidecar.envoy import settings as envoy
from abreast_sidecar.errors import ServerError, SettingError
from abreast_sidecar.settings import ENV_PREFIX, text

if TYPE_CHECKING:
    from abreast_sidecar.envoy.settings import SocketAddress
    from abreast_sidecar.stack.stack import Stack

PREFERRED_REDIS_PORT = 16379  # so that services find Redis again in the next run
UPSTREAM_CONNECT_TIMEOUT_S = 1.0
SIDECAR_CALL_TIMEOUT_S = 10.0
SHARE_OPTIONS = ("sample_safe", "sample_unsafe", "baseline_share")
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
MONITOR_INTERVAL_S = 1.0
HEALTH_GRACE_S = 4.0  # for Envoy's first health checks
MAX_CAPTURE_SILENCE_S = 15.0  # between the first mirrored request and a warning about missing captures
MAX_SERVER_RESTARTS, RESTART_WINDOW_S = 5, 60.0
STARTUP_TEMPLATE = """
everything runs for the service {service}

  users' requests  {envoy}   send them here, not to the versions
  old              {old}
  new              {new}
  page             {page}   shows the differences in a browser
  mirrored         {safe} of GET, HEAD and OPTIONS requests, {unsafe} of others

In both versions, after `pip install abreast`:

  from abreast import ParallelRunMiddleware
  app.add_middleware(ParallelRunMiddleware)

and in their environment:

  ABREAST_SERVICE={service}
  ABREAST_REDIS_URL={redis}

Then, in another terminal{address}:

  abreast status     outcomes of the compared requests
  abreast findings   the differences
  abreast doctor     problems, if nothing is compared

{data_text} Ctrl-C stops all servers.
"""


def parse_upstream(value: str) -> tuple[envoy.SocketAddress, str]:
    """Return the endpoint and its server name for TLS, which is empty for plain HTTP."""
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
@click.option("--old", type=UPSTREAM_TYPE, multiple=True, required=True, help="URL of the old version (repeatable).")
@click.option("--new", type=UPSTREAM_TYPE, multiple=True, required=True, help="URL of the new version (repeatable).")
@click.option(
    "--listen",
    type=LISTENER_TYPE,
    default="127.0.0.1:8080",
    show_default=True,
    help="Address for users' requests. :8080 listens on all addresses.",
)
@click.option(
    "--service",
    type=ParserParamType("name", text),
    default="service",
    show_default=True,
    help="Name of the service, the same as in the middleware.",
)
@click.option(
    "--sample",
    "sample_safe",
    type=SHARE_TYPE,
    default="100%",
    show_default=True,
    help="Share of GET, HEAD and OPTIONS requests to mirror.",
)
@click.option(
    "--sample-unsafe",
    type=SHARE_TYPE,
    default="0%",
    show_default=True,
    help="Share of all other requests to mirror. Both versions execute them!",
)
@click.option(
    "--baseline",
    "baseline_share",
    type=SHARE_TYPE,
    default="10%",
    show_default=True,
    help="Share of the mirrored safe requests that old receives twice, to detect noise.",
)
@click.option(
    "--health-path",
    type=ParserParamType("path", envoy.parse_health_check),
    default="/healthz",
    show_default=True,
    help="Path that Envoy requests from new once a second. Any status below 500 is healthy. tcp: only connect.",
)
@click.option(
    "--sticky",
    type=ParserParamType("key", envoy.parse_sticky),
    default=None,
    help="Key that keeps a user on one version: header:NAME, cookie:NAME or source-ip.",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory that keeps the ledger across restarts.  [default: delete the ledger at the end]",
)
@click.option("--grpc", type=LISTENER_TYPE, default=DEFAULT_ADDRESS, show_default=True, help="Address of the gRPC API.")
@click.option(
    "--http",
    type=LISTENER_TYPE,
    default="127.0.0.1:8090",
    show_default=True,
    help="Address of health, metrics and the web page.",
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

    The command prints the settings that the versions need. Ctrl-C or SIGTERM stops all started servers.
    """
    from abreast_sidecar.stack.stack import Stack

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
            ignore_termination_signals()  # so that nothing interrupts the shutdown
            click.echo("\nstopping")


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and on hangup too, and on SIGINT even if the shell's `&` ignores it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATION_SIGNALS)}
    for number, handler in handlers.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # nohup ignores it
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
                f"--{version}: all URLs of a version must have the same scheme, and the same host name for https"
            )
        tls_names[f"{version}_tls"] = server_names.pop()
    options = {name: value for name, value in options.items() if value is not None}
    upstream_endpoints = {"old": tuple(endpoint for endpoint, _ in old), "new": tuple(endpoint for endpoint, _ in new)}
    return envoy.EnvoySettings(**upstream_endpoints, **tls_names, **options)  # type: ignore[arg-type]  # the options' names are the fields'


def apply_requested_shares(ctx: click.Context, stack: Stack) -> None:
    """Apply the shares of the command line even if the data directory has other ones."""
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
        lambda calls: calls.traffic.GetTraffic(api.GetTrafficRequest(service=service), timeout=calls.timeout_s)
    ).traffic
    if any(abs(getattr(traffic, name) - share) > 1e-6 for name, share in requested_shares.items()):
        link.call(lambda calls: calls.traffic.UpdateTraffic(request, timeout=calls.timeout_s))


def warn_of_unreachable_upstreams(versions: dict[str, Upstreams]) -> None:
    for version, upstreams in versions.items():
        for endpoint, _name in upstreams:
            try:
                socket.create_connection((endpoint.host, endpoint.port), timeout=UPSTREAM_CONNECT_TIMEOUT_S).close()
            except OSError:
                address = f"{endpoint.host}:{endpoint.port}"
                click.echo(f"{version} does not answer at {address} yet; Envoy uses it as soon as it does", err=True)


def format_startup_message(stack: Stack, data_dir: Path | None) -> str:
    settings = stack.envoy_settings
    address = "" if stack.grpc_address == DEFAULT_ADDRESS else f", after `export ABREAST_SIDECAR={stack.grpc_address}`"
    return STARTUP_TEMPLATE.format(
        service=settings.service,
        envoy=stack.envoy_url,
        old=_format_urls(settings.old, tls=bool(settings.old_tls)),
        new=_format_urls(settings.new, tls=bool(settings.new_tls)),
        safe=format_percent(settings.sample_safe),
        unsafe=format_percent(settings.sample_unsafe),
        redis=stack.redis_url,
        page=stack.http_url,
        address=address,
        data_text=f"The data is kept in {data_dir}."
        if data_dir
        else "The data is deleted at the end, unless you use --data.",
    )


def _format_urls(endpoints: Sequence[SocketAddress], *, tls: bool) -> str:
    return ", ".join(f"{'https' if tls else 'http'}://{endpoint.host}:{endpoint.port}" for endpoint in endpoints)


class StackMonitor:
    def __init__(self, stack: Stack, sleep: Callable[[float], None] = time.sleep) -> None:
        self.stack = stack
        self.sleep = sleep
        self.service = stack.envoy_settings.service
        self.started_at = time.monotonic()
        self.is_healthy: dict[str, bool] = {"old": True, "new": True}
        self.captured_versions: set[str] = set()
        self.first_mirrored_at: float | None = None
        self.warned_versions: set[str] = set()
        self._restart_times: deque[float] = deque(maxlen=MAX_SERVER_RESTARTS)
        self._redis: Any = redis.Redis.from_url(
            stack.redis_url,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    def run(self) -> None:
        """Check every second until KeyboardInterrupt. Raise ServerError if servers keep ending."""
        while True:
            self.check()
            self.sleep(MONITOR_INTERVAL_S)

    def check(self) -> None:
        for line in self.stack.restart_exited():
            print_timestamped(line)
            self._restart_times.append(time.monotonic())
        times = self._restart_times
        if len(times) == MAX_SERVER_RESTARTS and times[-1] - times[0] < RESTART_WINDOW_S:
            raise ServerError(f"servers keep ending; see their logs in {self.stack.data_directory.path}")
        try:
            facts = read_envoy_facts(self.stack.admin_url)
        except UnreachableError:
            return
        if time.monotonic() - self.started_at > HEALTH_GRACE_S:
            self._report_health(facts)
        self._report_captures(facts)

    def _report_health(self, facts: EnvoyFacts) -> None:
        path = self.stack.envoy_settings.health_path
        failed_probe = "no connection" if path == "tcp" else f"GET {path} gets no status below 500 within a second"
        problems = [f"{endpoint.address}: {endpoint.problem}" for endpoint in facts.old_endpoints if endpoint.problem]
        problem_by_version = {"old": "", "new": ""}
        if len(problems) == len(facts.old_endpoints):
            problem_by_version["old"] = f"old can't be reached: {', '.join(problems)}"
        if not facts.stats.get("cluster.new.membership_healthy"):
            problem_by_version["new"] = f"Envoy finds new unhealthy: {failed_probe} (--health-path)"
        for version, problem in problem_by_version.items():
            if self.is_healthy[version] == bool(problem):
                self.is_healthy[version] = not problem
                print_timestamped(problem or f"{version} is healthy")

    def _report_captures(self, facts: EnvoyFacts) -> None:
        missing_versions = {"old", "new"} - self.captured_versions
        if not missing_versions:
            return
        for version, process in sorted(self._capturing_processes().items()):
            if version in missing_versions:
                self.captured_versions.add(version)
                release = f", release {to_printable(process.release)}" if process.release else ""
                print_timestamped(f"{version} is captured (process {to_printable(process.host)}{release})")
        if self.first_mirrored_at is None and facts.mirrored_requests:
            self.first_mirrored_at = time.monotonic()
        if self.first_mirrored_at is not None and time.monotonic() - self.first_mirrored_at > MAX_CAPTURE_SILENCE_S:
            for version in sorted(missing_versions - self.captured_versions - self.warned_versions):
                self.warned_versions.add(version)
                print_timestamped(
                    f"Envoy mirrors requests, but {version} sends no captures: "
                    "check that it has the middleware and both settings (abreast doctor)"
                )

    def _capturing_processes(self) -> dict[str, ServiceProcess]:
        """Return one process per version of this run. The data directory also has processes of earlier runs."""
        try:
            reports = self._redis.hvals(join.reports_key(self.service))
        except redis.RedisError:
            return {}
        processes = [ServiceProcess.from_report(parse_report(text), time.time()) for text in reports]
        return {
            version: process
            for process in processes
            if process.report_age_s < time.monotonic() - self.started_at
            for version, captures in process.captures_by_version.items()
            if captures
        }


def print_timestamped(line: str) -> None:
    click.echo(f"{datetime.now():%H:%M:%S}  {line}")  # noqa: DTZ005  # local time
