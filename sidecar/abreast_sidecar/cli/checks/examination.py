"""All checks, in the order of a request's way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from abreast_sidecar.cli.checks import clocks, envoy, postgres, redis, services, sidecar
from abreast_sidecar.cli.checks.check import Check, CheckFactory, UnreachableError
from abreast_sidecar.cli.humane import to_printable
from abreast_sidecar.store.migrate import load_migrations

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class DoctorAddresses:
    grpc: str
    http_url: str
    envoy_admin: tuple[str, ...]
    redis_url: str
    postgres_url: str
    service: str = ""  # empty: the only one


def run_checks(addresses: DoctorAddresses) -> list[Check]:
    """Whatever is down: every failure is a check, never an exception."""
    return DoctorRun(addresses).checks


class DoctorRun:
    def __init__(self, addresses: DoctorAddresses) -> None:
        self.addresses = addresses
        self.clock_offsets_s: dict[str, float] = {}  # seconds, by clock
        self.checks = [*sidecar.check_sidecar(addresses.grpc, addresses.http_url)]
        self._check_envoys()
        self._check_captures()
        self._check_ledger()
        self.checks += clocks.check_clocks(self.clock_offsets_s)

    def _check_envoys(self) -> None:
        self.envoy_facts: list[envoy.EnvoyFacts] = []
        for admin in self.addresses.envoy_admin:
            read_facts = functools.partial(envoy.read_envoy_facts, admin)
            facts = self._read_or_fail(
                envoy.ENVOY_CHECKS, read_facts, "--envoy-admin or ABREAST_ENVOY_ADMIN", admin
            )
            if facts is not None:
                self.envoy_facts.append(facts)
                self.checks += envoy.check_envoy(facts)

    def _check_captures(self) -> None:
        facts = self._read_or_fail(
            redis.REDIS_CHECKS,
            functools.partial(redis.read_redis_facts, self.addresses.redis_url, self._service_candidates()),
            "--redis-url or ABREAST_REDIS_URL",
        )
        if facts is None:
            return
        self.clock_offsets_s["Redis"] = facts.clock_offset_s
        service = self._select_service(facts)
        processes = [
            services.ServiceProcess.from_report(report, facts.server_time_s)
            for report in facts.reports.get(service, [])
        ]
        mirrored = (
            sum(envoy_fact.mirrored_requests for envoy_fact in self.envoy_facts) if self.envoy_facts else None
        )
        if processes or service not in facts.unregistered_shards:
            other_services = sorted(set(facts.reports) - {service})
            self.checks += services.check_services(service, processes, mirrored, other_services)
        self.checks += [*redis.check_registration(facts, service), *redis.check_redis(facts)]
        if processes or service in facts.unregistered_shards:
            self.checks += redis.check_join(facts, service, mirrored)

    def _select_service(self, facts: redis.RedisFacts) -> str:
        """The one that is asked for, or that Envoy serves, or the only one."""
        return next(
            iter([*self._service_candidates(), *(facts.reports if len(facts.reports) == 1 else ())]), ""
        )

    def _service_candidates(self) -> list[str]:
        names = (self.addresses.service, *(facts.service for facts in self.envoy_facts))
        return [name for name in names if name]

    def _check_ledger(self) -> None:
        read_facts = functools.partial(postgres.read_postgres_facts, self.addresses.postgres_url)
        facts = self._read_or_fail(
            postgres.POSTGRES_CHECKS, read_facts, "--postgres-url or ABREAST_POSTGRES_URL"
        )
        if facts is not None:
            self.clock_offsets_s["Postgres"] = facts.clock_offset_s
            self.checks += postgres.check_postgres(facts, load_migrations()[-1].version)

    def _read_or_fail(
        self, check_factory: CheckFactory, read_facts: Callable[[], Facts], option: str, address: str = ""
    ) -> Facts | None:
        try:
            return read_facts()
        except UnreachableError as error:
            observation = (
                f"can't be reached{f' at {address}' if address else ''}: {to_printable(str(error), 200)}"
            )
            self.checks.append(
                check_factory.fail("reachable", observation, f"is it running? say where it is with {option}")
            )
            return None
