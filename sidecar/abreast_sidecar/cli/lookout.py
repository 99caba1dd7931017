"""Watches over a running stack: says what a person wants to know, and starts again what has ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from abreast import join
from abreast_sidecar.cli.checks import UnreachableError
from abreast_sidecar.cli.checks import envoy as envoy_checks
from abreast_sidecar.cli.checks.redis import parse_report
from abreast_sidecar.cli.checks.services import ServiceProcess
from abreast_sidecar.cli.humane import to_printable
from abreast_sidecar.errors import ServerError

if TYPE_CHECKING:
    from abreast_sidecar.embedded.stack import Stack

MONITOR_INTERVAL_S = 1.0  # seconds; old gets a connection as often, as new gets a health check
HEALTH_GRACE_S = 4.0  # seconds: Envoy's first health checks
MAX_CAPTURE_SILENCE_S = 15.0  # seconds that mirrored requests may bring no capture before that is said
MAX_SERVER_RESTARTS, RESTART_WINDOW_S = 5, 60.0  # servers that may end in so many seconds


class StackMonitor:
    def __init__(self, stack: Stack, sleep: Callable[[float], None] = time.sleep) -> None:
        """`pause` lasts so many seconds."""
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
        """For ever; ended by KeyboardInterrupt. Raise ServerError where a server keeps ending."""
        while True:
            self.check()
            self.sleep(MONITOR_INTERVAL_S)

    def check(self) -> None:
        for line in self.stack.restart_exited():
            print_timestamped(line)
            self._restart_times.append(time.monotonic())
        if (
            len(self._restart_times) == MAX_SERVER_RESTARTS
            and self._restart_times[-1] - self._restart_times[0] < RESTART_WINDOW_S
        ):
            raise ServerError(f"servers keep ending; the logs are in {self.stack.data_directory.path}")
        try:
            facts = envoy_checks.read_envoy_facts(self.stack.admin_url)
        except UnreachableError:
            return
        if time.monotonic() - self.started_at > HEALTH_GRACE_S:
            self._report_health(facts)
        self._report_captures(facts)

    def _report_health(self, facts: envoy_checks.EnvoyFacts) -> None:
        path = self.stack.envoy_settings.health_path
        failed_probe = (
            "no connection" if path == "tcp" else f"GET {path} gets no answer below 500 within a second"
        )
        problems = [
            f"{endpoint.address}: {endpoint.problem}" for endpoint in facts.old_endpoints if endpoint.problem
        ]
        problem_by_version = {
            "old": ""
            if len(problems) < len(facts.old_endpoints)
            else f"old can't be reached: {', '.join(problems)}",
            "new": ""
            if facts.stats.get("cluster.new.membership_healthy")
            else f"Envoy finds new unhealthy: {failed_probe} (--health-path)",
        }
        for version, problem in problem_by_version.items():
            if self.is_healthy[version] == bool(problem):
                self.is_healthy[version] = not problem
                print_timestamped(problem or f"{version} is healthy")

    def _report_captures(self, facts: envoy_checks.EnvoyFacts) -> None:
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
        if (
            self.first_mirrored_at is not None
            and time.monotonic() - self.first_mirrored_at > MAX_CAPTURE_SILENCE_S
        ):
            for version in sorted(missing_versions - self.captured_versions - self.warned_versions):
                self.warned_versions.add(version)
                print_timestamped(
                    f"requests are mirrored, but {version} sends no captures: is the middleware in it, with both settings? (abreast doctor)"
                )

    def _capturing_processes(self) -> dict[str, ServiceProcess]:
        """By version, of this run: the data folder remembers processes of earlier ones."""
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
    click.echo(f"{datetime.now():%H:%M:%S}  {line}")  # noqa: DTZ005  # a clock on the wall
