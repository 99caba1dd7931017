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
from abreast_sidecar.cli.checks.services import Process
from abreast_sidecar.cli.humane import printable
from abreast_sidecar.errors import ServerError

if TYPE_CHECKING:
    from abreast_sidecar.embedded.stack import Stack

INTERVAL = 1.0  # seconds; old gets a connection as often, as new gets a health check
GRACE = 4.0  # seconds: Envoy's first health checks
SILENT = 15.0  # seconds that mirrored requests may bring no capture before that is said
MOST_ENDS, MINUTE = 5, 60.0  # servers that may end in so many seconds


class Lookout:
    def __init__(self, stack: Stack, pause: Callable[[float], None] = time.sleep) -> None:
        """`pause` lasts so many seconds."""
        self.stack = stack
        self.pause = pause
        self.service = stack.envoy_settings.service
        self.began = time.monotonic()
        self.healthy: dict[str, bool] = {"old": True, "new": True}
        self.captured: set[str] = set()
        self.mirrored_since: float | None = None
        self.warned: set[str] = set()
        self._ends: deque[float] = deque(maxlen=MOST_ENDS)
        self._redis: Any = redis.Redis.from_url(
            stack.redis_url,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    def watch(self) -> None:
        """For ever; ended by KeyboardInterrupt. Raise ServerError where a server keeps ending."""
        while True:
            self.look()
            self.pause(INTERVAL)

    def look(self) -> None:
        for line in self.stack.revive():
            say(line)
            self._ends.append(time.monotonic())
        if len(self._ends) == MOST_ENDS and self._ends[-1] - self._ends[0] < MINUTE:
            raise ServerError(f"servers keep ending; the logs are in {self.stack.folder.path}")
        try:
            facts = envoy_checks.look(self.stack.admin_url)
        except UnreachableError:
            return
        if time.monotonic() - self.began > GRACE:
            self._tell_health(facts)
        self._tell_captures(facts)

    def _tell_health(self, facts: envoy_checks.EnvoyFacts) -> None:
        path = self.stack.envoy_settings.health_path
        asked = "no connection" if path == "tcp" else f"GET {path} gets no answer below 500 within a second"
        troubles = [f"{one.address}: {one.trouble}" for one in facts.old if one.trouble]
        now = {
            "old": "" if len(troubles) < len(facts.old) else f"old can't be reached: {', '.join(troubles)}",
            "new": ""
            if facts.stats.get("cluster.new.membership_healthy")
            else f"Envoy finds new unhealthy: {asked} (--health-path)",
        }
        for version, trouble in now.items():
            if self.healthy[version] == bool(trouble):
                self.healthy[version] = not trouble
                say(trouble or f"{version} is healthy")

    def _tell_captures(self, facts: envoy_checks.EnvoyFacts) -> None:
        missing = {"old", "new"} - self.captured
        if not missing:
            return
        for version, process in sorted(self._capturing().items()):
            if version in missing:
                self.captured.add(version)
                release = f", release {printable(process.release)}" if process.release else ""
                say(f"{version} is captured (process {printable(process.host)}{release})")
        if self.mirrored_since is None and facts.mirrored:
            self.mirrored_since = time.monotonic()
        if self.mirrored_since is not None and time.monotonic() - self.mirrored_since > SILENT:
            for version in sorted(missing - self.captured - self.warned):
                self.warned.add(version)
                say(
                    f"requests are mirrored, but {version} sends no captures: is the middleware in it, with both settings? (abreast doctor)"
                )

    def _capturing(self) -> dict[str, Process]:
        """By version, of this run: the data folder remembers processes of earlier ones."""
        try:
            texts = self._redis.hvals(join.reports(self.service))
        except redis.RedisError:
            return {}
        processes = [Process.of(parse_report(text), time.time()) for text in texts]
        return {
            version: process
            for process in processes
            if process.ago < time.monotonic() - self.began
            for version, captures in process.versions.items()
            if captures
        }


def say(line: str) -> None:
    click.echo(f"{datetime.now():%H:%M:%S}  {line}")  # noqa: DTZ005  # a clock on the wall
