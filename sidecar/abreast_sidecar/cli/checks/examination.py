"""All checks, in the order of a request's way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from abreast_sidecar.cli.checks import clocks, envoy, postgres, redis, services, sidecar
from abreast_sidecar.cli.checks.check import Check, Part, UnreachableError
from abreast_sidecar.cli.humane import printable
from abreast_sidecar.store.migrate import migrations

T = TypeVar("T")


@dataclass(frozen=True)
class Addresses:
    grpc: str
    http_url: str
    envoy_admin: tuple[str, ...]
    redis_url: str
    postgres_url: str
    service: str = ""  # empty: the only one


def examine(where: Addresses) -> list[Check]:
    """Whatever is down: every failure is a check, never an exception."""
    return Examination(where).checks


class Examination:
    def __init__(self, where: Addresses) -> None:
        self.where = where
        self.ahead: dict[str, float] = {}  # seconds, by clock
        self.checks = [*sidecar.judge(where.grpc, where.http_url)]
        self._envoys()
        self._captures()
        self._ledger()
        self.checks += clocks.judge(self.ahead)

    def _envoys(self) -> None:
        self.envoys: list[envoy.EnvoyFacts] = []
        for admin in self.where.envoy_admin:
            look = functools.partial(envoy.look, admin)
            found = self._look(envoy.ENVOY, look, "--envoy-admin or ABREAST_ENVOY_ADMIN", admin)
            if found is not None:
                self.envoys.append(found)
                self.checks += envoy.judge(found)

    def _captures(self) -> None:
        found = self._look(
            redis.REDIS,
            functools.partial(redis.look, self.where.redis_url, self._named()),
            "--redis-url or ABREAST_REDIS_URL",
        )
        if found is None:
            return
        self.ahead["Redis"] = found.ahead
        service = self._service(found)
        processes = [services.Process.of(report, found.now) for report in found.reports.get(service, [])]
        mirrored = sum(one.mirrored for one in self.envoys) if self.envoys else None
        if processes or service not in found.unregistered:
            others = sorted(set(found.reports) - {service})
            self.checks += services.judge(service, processes, mirrored, others)
        self.checks += [*redis.judge_registration(found, service), *redis.judge(found)]
        if processes or service in found.unregistered:
            self.checks += redis.judge_join(found, service, mirrored)

    def _service(self, found: redis.RedisFacts) -> str:
        """The one that is asked for, or that Envoy serves, or the only one."""
        return next(iter([*self._named(), *(found.reports if len(found.reports) == 1 else ())]), "")

    def _named(self) -> list[str]:
        names = (self.where.service, *(one.service for one in self.envoys))
        return [name for name in names if name]

    def _ledger(self) -> None:
        look = functools.partial(postgres.look, self.where.postgres_url)
        found = self._look(postgres.POSTGRES, look, "--postgres-url or ABREAST_POSTGRES_URL")
        if found is not None:
            self.ahead["Postgres"] = found.ahead
            self.checks += postgres.judge(found, migrations()[-1].version)

    def _look(self, part: Part, look: Callable[[], T], option: str, where: str = "") -> T | None:
        try:
            return look()
        except UnreachableError as error:
            found = f"can't be reached{f' at {where}' if where else ''}: {printable(str(error), 200)}"
            self.checks.append(part.fail("reachable", found, f"is it running? say where it is with {option}"))
            return None
