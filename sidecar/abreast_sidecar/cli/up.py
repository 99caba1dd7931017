"""`abreast up`: Envoy, Redis, Postgres and the sidecar for two versions that already run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import redis

from abreast.protocol import join
from abreast.protocol.redis_client import connect_sync
from abreast.settings import setting, share
from abreast_sidecar.cli.doctor import UnreachableError
from abreast_sidecar.cli.doctor.envoy import LOGIN_STAT, EnvoyFacts, read_envoy_facts, try_connect
from abreast_sidecar.cli.doctor.servers import parse_report
from abreast_sidecar.cli.doctor.services import ServiceProcess
from abreast_sidecar.cli.options import (
    DEFAULT_ADDRESS,
    ParserParamType,
    read_settings,
    setting_options,
    warn_of_unused_variables,
)
from abreast_sidecar.client.output import format_percent, to_printable
from abreast_sidecar.client.sidecar_client import SidecarClient
from abreast_sidecar.envoy import settings as envoy
from abreast_sidecar.envoy.config import CONFIG_FILE, load_config
from abreast_sidecar.envoy.probe import HTTP_2, probe_protocol
from abreast_sidecar.errors import ServerError, SettingError
from abreast_sidecar.settings import ENV_PREFIX, Settings

if TYPE_CHECKING:
    from abreast_sidecar.envoy.settings import SocketAddress
    from abreast_sidecar.stack.stack import Stack

PREFERRED_REDIS_PORT = 16379  # so that services find Redis again in the next run
SIDECAR_CALL_TIMEOUT_S = 10.0
REDIS_TIMEOUT_S = 1.0
SHARE_STEP = 1e-6
SHARE_OPTIONS = ("sample_safe", "sample_unsafe", "baseline_share")
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
MONITOR_INTERVAL_S = 1.0
REDIS_REWRITE_INTERVAL_S = 3600.0  # removes processed captures from the append-only file
HEALTH_GRACE_S = 4.0  # for Envoy's first health checks
MAX_CAPTURE_SILENCE_S = 15.0  # between the first mirrored request and a warning about missing captures
MAX_SERVER_RESTARTS, RESTART_WINDOW_S = 5, 60.0
UNKEPT_DATA_TEXT = "The data is deleted at the end, unless you use --data."
STARTUP_TEMPLATE = """
everything runs for {title}

  users' requests  {envoy}   send them here, not to the versions
  page             {page}   shows the differences in a browser
{services}

Envoy captures both versions. A version can also have the middleware, which adds route templates, effects and
downstream times. After `pip install abreast`:

  from abreast import ParallelRunMiddleware
  app.add_middleware(ParallelRunMiddleware)

and in its environment:

  ABREAST_SERVICE={service}
  ABREAST_REDIS_URL={redis}
  ABREAST_EDGE_KEY={edge_key}   optional: proves that requests come from this Envoy
  ABREAST_REDACT_KEY_FILE={redaction_key_file}   optional: to compare secrets by their hashes

Then, in another terminal{address}:

  abreast status     outcomes of the compared requests
  abreast findings   the differences
  abreast doctor     problems, if nothing is compared

{data_text} Ctrl-C stops all servers.
"""
SERVICE_TEMPLATE = """{title}  old              {old}
  new              {new}
  mirrored         {safe} of GET, HEAD and OPTIONS requests, {unsafe} of others{rules}"""


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
CHOSEN_SETTINGS = (  # by --old and --new, or by the stack
    *("old", "new", "old_tls", "new_tls", "admin", "collector"),
    *("sidecar", "sidecar_tls", "sidecar_ca", "sidecar_cert", "sidecar_key", "sidecar_token"),
)
Upstreams = tuple[tuple[envoy.SocketAddress, str], ...]


@dataclass(frozen=True, repr=False)
class UpSettings(envoy.EnvoySettings):
    """Envoy's settings. `abreast up` mirrors all safe requests by default."""

    sample_safe: float = setting(1.0, share, "Share of the other GET, HEAD and OPTIONS requests to mirror")
    sample_unsafe: float = setting(0.0, share, "Share of all remaining requests to mirror. Both versions execute them")
    baseline_share: float = setting(
        0.1, share, "Share of the mirrored safe requests that the answering version receives twice, to detect noise"
    )


@click.command(context_settings={"show_default": True})
@click.option("--old", type=UPSTREAM_TYPE, multiple=True, help="URL of the old version (repeatable).")
@click.option("--new", type=UPSTREAM_TYPE, multiple=True, help="URL of the new version (repeatable).")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the services, in place of --old and --new.  [default: {CONFIG_FILE} in the working directory]",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory that keeps the ledger across restarts.  [default: delete the ledger at the end]",
)
@click.option("--grpc", type=LISTENER_TYPE, default=DEFAULT_ADDRESS, help="Address of the gRPC API.")
@click.option(
    "--http", type=LISTENER_TYPE, default="127.0.0.1:8090", help="Address of health, metrics and the web page."
)
@setting_options(UpSettings, without=CHOSEN_SETTINGS, aliases={"baseline_share": "--baseline"})
@click.pass_context
def up_command(
    ctx: click.Context,
    /,
    old: Upstreams,
    new: Upstreams,
    config: Path | None,
    data: Path | None,
    grpc: envoy.SocketAddress,
    http: envoy.SocketAddress,
    **options: str | bool | None,
) -> None:
    """Start Envoy, Redis, Postgres and the sidecar for two versions that already run.

    Name the versions with --old and --new, or several services in a file. The command prints the settings that the versions need. Ctrl-C or SIGTERM stops all started servers.
    """
    from abreast_sidecar.stack.stack import Stack

    services: Iterable[envoy.EnvoySettings]
    config = find_config(config, old, new)
    warn_of_unused_variables(*list_used_variables(envoy.ENVOY_WIDE_SETTINGS if config else None))
    if config:
        services = load_config(config).build_services(options=options)
    else:
        services = [build_envoy_settings(old, new, options)]
    services = list(map(adapt_to_protocol, services))
    for settings in services:
        for warning in settings.list_warnings():
            click.echo(f"abreast: {warning}", err=True)
    check_listeners(grpc, http)
    stack = Stack(
        *services,
        config=config,
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
            warn_of_unreachable_upstreams(stack.services)
            StackMonitor(stack).run()
        finally:
            for number in (signal.SIGINT, *TERMINATION_SIGNALS):
                signal.signal(number, signal.SIG_IGN)  # so that nothing interrupts the shutdown
            click.echo("\nstopping")


def find_config(config: Path | None, old: Upstreams, new: Upstreams) -> Path | None:
    """Return the configuration file, None if the options name both versions. Raise SettingError."""
    if config and (old or new):
        raise SettingError(f"--old and --new exclude --config: change {config}")
    if config is None and not (old or new) and Path(CONFIG_FILE).is_file():
        config = Path(CONFIG_FILE)
        click.echo(f"  using {CONFIG_FILE}", err=True)
    if config is None and not (old and new):
        raise click.UsageError(f"name the versions with --old and --new, or their services in {CONFIG_FILE} (--config)")
    return config


def check_listeners(grpc: SocketAddress, http: SocketAddress) -> None:
    """Raise SettingError if the sidecar would refuse the addresses."""
    listeners = {"ABREAST_GRPC_LISTEN": str(grpc), "ABREAST_HTTP_LISTEN": str(http)}
    try:
        settings = Settings.from_environment({**os.environ, **listeners})
    except SettingError as error:
        message = str(error).replace("ABREAST_GRPC_LISTEN", "--grpc").replace("ABREAST_HTTP_LISTEN", "--http")
        raise SettingError(message) from error
    if settings.tls_cert_file:
        raise SettingError("ABREAST_TLS_CERT_FILE must not be set: run `abreast sidecar` and Envoy separately for TLS")


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


def build_envoy_settings(old: Upstreams, new: Upstreams, options: dict[str, str | bool | None]) -> UpSettings:
    return dataclasses.replace(
        read_settings(UpSettings, options),
        old=tuple(endpoint for endpoint, _ in old),
        new=tuple(endpoint for endpoint, _ in new),
        old_tls=_get_tls_name("old", old),
        new_tls=_get_tls_name("new", new),
    )


def _get_tls_name(version: str, upstreams: Upstreams) -> str:
    server_names = {name for _endpoint, name in upstreams}
    if len(server_names) > 1:
        raise SettingError(
            f"--{version}: all URLs of a version must have the same scheme, and the same host name for https"
        )
    return server_names.pop()


def list_used_variables(envoy_settings: Collection[str] | None = None) -> Iterator[str]:
    """Return the variables that the command reads: for Envoy those of `envoy_settings`, None for all."""
    from abreast_sidecar.stack.stack import STACK_VARIABLES

    names = {part.name for part in UpSettings.declared()} if envoy_settings is None else set(envoy_settings)
    shares = [] if envoy_settings is None else SHARE_OPTIONS  # the file has those of its services
    yield from (f"{ENV_PREFIX}{name.upper()}" for name in names.difference(CHOSEN_SETTINGS))
    yield from (
        part.variable
        for part in Settings.declared()
        if part.variable not in STACK_VARIABLES and part.name not in shares
    )


def adapt_to_protocol(settings: envoy.EnvoySettings) -> envoy.EnvoySettings:
    """Return settings for services that speak only HTTP/2 without TLS, such as gRPC. Raise SettingError if they differ."""
    health_path = settings.health_path if settings.health_path.startswith("/") else "/"
    protocols = {
        f"{version} at {endpoint}": protocol
        for version, endpoints, tls_name in (
            ("old", settings.old, settings.old_tls),
            ("new", settings.new, settings.new_tls),
        )
        if not tls_name
        for endpoint in endpoints
        if (protocol := probe_protocol(endpoint, health_path))
    }
    if len(set(protocols.values())) > 1:
        texts = ", ".join(f"{place} speaks {protocol}" for place, protocol in protocols.items())
        raise SettingError(f"both versions must speak the same protocol: {texts}")
    if settings.upstream_http2 or HTTP_2 not in protocols.values():
        return settings
    click.echo(f"  both versions speak {HTTP_2}: Envoy uses it, and checks the health of new by connecting", err=True)
    return dataclasses.replace(settings, upstream_http2=True, health_path=envoy.TCP_HEALTH_CHECK)


def apply_requested_shares(ctx: click.Context, stack: Stack) -> None:
    """Apply the shares of the command line even if the data directory has other ones."""
    from abreast.v1 import traffic_pb2 as api

    requested_shares = {
        name: getattr(stack.envoy_settings, name) for name in SHARE_OPTIONS if ctx.params[name] is not None
    }
    rules = stack.envoy_settings.sample if ctx.params["sample"] else ()
    if not requested_shares and not rules:
        return
    service = stack.envoy_settings.service
    link = SidecarClient(stack.grpc_address, SIDECAR_CALL_TIMEOUT_S)
    traffic = link.call(lambda calls: calls.traffic.GetTraffic(api.GetTrafficRequest(service=service))).traffic
    changes: dict[str, Any] = {
        name: share for name, share in requested_shares.items() if abs(getattr(traffic, name) - share) > SHARE_STEP
    }
    rule_shares = {
        rule.name: rule.share
        for rule in rules
        if abs(traffic.rule_shares.get(rule.name, rule.share) - rule.share) > SHARE_STEP
    }
    if changes or rule_shares:
        request = api.UpdateTrafficRequest(
            service=service, actor="abreast up", reason="options of abreast up", rule_shares=rule_shares, **changes
        )
        link.call(lambda calls: calls.traffic.UpdateTraffic(request))


def warn_of_unreachable_upstreams(services: Sequence[envoy.EnvoySettings]) -> None:
    for settings in services:
        for version, endpoints in (("old", settings.old), ("new", settings.new)):
            name = version if len(services) == 1 else f"{version} of {settings.service}"
            for endpoint in endpoints:
                if try_connect(endpoint.host, endpoint.port):
                    address = f"{endpoint.host}:{endpoint.port}"
                    click.echo(f"{name} does not answer at {address} yet; Envoy uses it as soon as it does", err=True)


def format_startup_message(stack: Stack, data_dir: Path | None) -> str:
    address = "" if stack.grpc_address == DEFAULT_ADDRESS else f", after `export ABREAST_SIDECAR={stack.grpc_address}`"
    names = [settings.service for settings in stack.services]
    return STARTUP_TEMPLATE.format(
        title=f"the service {names[0]}" if len(names) == 1 else f"the services {', '.join(names)}",
        service=names[0] if len(names) == 1 else "NAME",
        envoy=stack.envoy_url,
        services="\n".join(SERVICE_TEMPLATE.format(**_describe_service(settings)) for settings in stack.services),
        redis=stack.service_redis_url,
        redaction_key_file=stack.redaction_key_file,
        edge_key=stack.envoy_settings.edge_key,
        page=stack.http_url,
        address=address,
        data_text=f"The data is kept in {data_dir}." if data_dir else UNKEPT_DATA_TEXT,
    )


def _describe_service(settings: envoy.EnvoySettings) -> dict[str, str]:
    requests = " and ".join([*settings.hosts, *settings.prefixes])
    return {
        "title": f"\n  {settings.service}  {requests}\n" if requests else "",
        "old": _format_urls(settings.old, tls=bool(settings.old_tls)),
        "new": _format_urls(settings.new, tls=bool(settings.new_tls)),
        "safe": format_percent(settings.sample_safe),
        "unsafe": format_percent(settings.sample_unsafe),
        "rules": "".join(f"\n{' ' * 19}{format_percent(rule.share)} of {rule.condition}" for rule in settings.sample),
    }


def _format_urls(endpoints: Sequence[SocketAddress], *, tls: bool) -> str:
    return ", ".join(f"{'https' if tls else 'http'}://{endpoint.host}:{endpoint.port}" for endpoint in endpoints)


class StackMonitor:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._redis = connect_sync(stack.redis_url, timeout=REDIS_TIMEOUT_S)
        self.services = [
            ServiceMonitor(stack, settings.service, self._redis, is_only=len(stack.services) == 1)
            for settings in stack.services
        ]
        self._redis_rewritten_at = time.monotonic()
        self._restart_times: deque[float] = deque(maxlen=MAX_SERVER_RESTARTS)

    def run(self) -> None:
        """Check every second until KeyboardInterrupt. Raise ServerError if servers keep ending."""
        while True:
            self.check()
            time.sleep(MONITOR_INTERVAL_S)

    def check(self) -> None:
        for line in self.stack.restart_exited():
            print_timestamped(line)
            self._restart_times.append(time.monotonic())
        times = self._restart_times
        if len(times) == MAX_SERVER_RESTARTS and times[-1] - times[0] < RESTART_WINDOW_S:
            raise ServerError(f"servers keep ending; see their logs in {self.stack.data_directory.path}")
        if time.monotonic() - self._redis_rewritten_at > REDIS_REWRITE_INTERVAL_S:
            self._redis_rewritten_at = time.monotonic()
            with contextlib.suppress(redis.RedisError):
                self._redis.bgrewriteaof()
        with contextlib.suppress(UnreachableError):
            for monitor in self.services:
                monitor.check(read_envoy_facts(self.stack.admin_url, monitor.service))


class ServiceMonitor:
    """Reports the health and the captures of one service."""

    def __init__(self, stack: Stack, service: str, client: Any, *, is_only: bool) -> None:
        self.stack = stack
        self.service = service
        self.prefix = "" if is_only else f"{service}: "
        self.started_at = time.monotonic()
        self.is_healthy: dict[str, bool] = {"old": True, "new": True}
        self.captured_versions: set[str] = set()
        self.first_mirrored_at: float | None = None
        self.warned_versions: set[str] = set()
        self._redis = client

    @property
    def settings(self) -> envoy.EnvoySettings:
        return next(settings for settings in self.stack.services if settings.service == self.service)

    def print(self, line: str) -> None:
        print_timestamped(self.prefix + line)

    def check(self, facts: EnvoyFacts) -> None:
        if facts.stats.get(LOGIN_STAT) and not self.settings.connection_per_client:
            self.print(
                "a response asks for a login that belongs to a connection (NTLM, Negotiate): Envoy is restarted with "
                "--connection-per-client, so that users can't share a login, and does not copy such requests"
            )
            self.stack.restart_envoy(self.service, connection_per_client=True)
            return
        if time.monotonic() - self.started_at > HEALTH_GRACE_S:
            self._report_health(facts)
        self._report_captures(facts)

    def _report_health(self, facts: EnvoyFacts) -> None:
        path = self.settings.health_path
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
                self.print(problem or f"{version} is healthy")

    def _report_captures(self, facts: EnvoyFacts) -> None:
        modes = {"old": self.settings.old_capture, "new": self.settings.new_capture}
        missing_versions = {version for version in modes if modes[version] != "off"} - self.captured_versions
        if not missing_versions:
            return
        for version, process in sorted(self._capturing_processes().items()):
            if version in missing_versions:
                self.captured_versions.add(version)
                release = f", release {to_printable(process.release)}" if process.release else ""
                self.print(f"{version} is captured (process {to_printable(process.host)}{release})")
        if self.first_mirrored_at is None and facts.mirrored_requests:
            self.first_mirrored_at = time.monotonic()
        if self.first_mirrored_at is not None and time.monotonic() - self.first_mirrored_at > MAX_CAPTURE_SILENCE_S:
            for version in sorted(missing_versions - self.captured_versions - self.warned_versions):
                self.warned_versions.add(version)
                self.print(
                    f"Envoy mirrors requests, but {version} sends no captures: "
                    "check the collector, or the middleware and its settings (abreast doctor)"
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
