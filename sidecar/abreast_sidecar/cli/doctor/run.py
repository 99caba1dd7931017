"""`abreast doctor`: all checks, in the order in which a request passes the parts."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import click
from rich.table import Column, Table

from abreast_sidecar.cli.doctor import Check, CheckFactory, UnreachableError, envoy, servers, services
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import address_option, find_sidecar, json_option, service_option
from abreast_sidecar.client.output import (
    Console,
    format_quantity,
    format_seconds,
    make_console,
    style_text,
    to_printable,
)
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.data import find_run
from abreast_sidecar.store.migrate import load_migrations

CLOCK_CHECKS = CheckFactory("clocks")
MAX_CLOCK_OFFSET_S = 2.0
DEFAULT_ENVOY_ADMIN = "127.0.0.1:9901"
STATE_LABELS = {"ok": "ok", "warn": "warn", "fail": "FAIL"}

Facts = TypeVar("Facts")


@click.command()
@service_option
@click.option(
    "--envoy-admin", multiple=True, help="Admin address of an Envoy (repeatable).  [env var: ABREAST_ENVOY_ADMIN]"
)
@click.option("--redis-url", help="Redis that receives the captures.  [env var: ABREAST_REDIS_URL]")
@click.option("--postgres-url", help="Postgres that holds the ledger.  [env var: ABREAST_POSTGRES_URL]")
@click.option("--http", help="HTTP address of the sidecar.  [env var: ABREAST_HTTP_LISTEN]")
@click.option("--security", "checks_security", is_flag=True, help="Try what callers without a token can do.")
@address_option
@json_option
def doctor_command(
    service: str,
    envoy_admin: tuple[str, ...],
    redis_url: str | None,
    postgres_url: str | None,
    http: str | None,
    address: str | None,
    checks_security: bool,
    as_json: bool,
) -> int:
    """Check every part in the order in which a request passes it, and report what to fix.

    If `abreast up` runs on this machine, you need no options. Exits with 1 if a check fails.
    """
    address = find_sidecar(address)
    options = {
        "ABREAST_ENVOY_ADMIN": ",".join(envoy_admin),
        "ABREAST_REDIS_URL": redis_url,
        "ABREAST_POSTGRES_URL": postgres_url,
        "ABREAST_HTTP_LISTEN": http and http.removeprefix("http://").rstrip("/"),
    }
    overrides = {name: value for name, value in options.items() if value}
    settings = Settings.from_environment({**find_run(address), **os.environ, **overrides})
    doctor_run = DoctorRun(settings, address, service)
    checks = doctor_run.checks
    if checks_security:
        admins = settings.envoy_admin or (DEFAULT_ENVOY_ADMIN,)
        checks += services.check_security(address, doctor_run.http_url, admins)
    if as_json:
        click.echo(
            json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}, indent=2, ensure_ascii=False)
        )
    else:
        print_checks(make_console(), checks)
    return ExitCode.CHECK_FAILED if any(check.state == "fail" for check in checks) else ExitCode.OK


def print_checks(out: Console, checks: list[Check]) -> None:
    grid = Table.grid(*(Column(no_wrap=True) for _ in range(3)), Column(overflow="fold"), padding=(0, 2, 0, 0))
    part = ""
    for check in checks:
        grid.add_row(
            style_text(STATE_LABELS[check.state], check.state),
            style_text(check.part if check.part != part else "", "bold"),
            check.name,
            to_printable(check.found),
        )
        if check.advice:
            grid.add_row("", "", "", style_text(f"→ {check.advice}", check.state))
        part = check.part
    out.print(grid)
    failure_count, warning_count = (sum(check.state == state for check in checks) for state in ("fail", "warn"))
    out.print()
    if failure_count or warning_count:
        totals = f"{format_quantity(failure_count, 'failure')}, {format_quantity(warning_count, 'warning')}"
        out.print(f"{totals}; start with the first")
    else:
        out.print("all checks passed")


class DoctorRun:
    """The checks of all parts. A part that is down is a failed check, never an exception."""

    def __init__(self, settings: Settings, grpc_address: str, service: str) -> None:
        self.settings = settings
        self.service = service  # empty for the only one
        self.clock_offsets_s: dict[str, float] = {}  # by server
        self.envoy_facts: list[envoy.EnvoyFacts] = []
        host, _, port = settings.http_listen.rpartition(":")
        self.http_url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        self.checks = [*services.check_sidecar(grpc_address, self.http_url, service)]
        for admin in settings.envoy_admin or (DEFAULT_ENVOY_ADMIN,):
            self._check_envoy(admin)
        names = [self.service] if self.service else list(dict.fromkeys(facts.service for facts in self.envoy_facts))
        for name in names or [""]:
            number = len(self.checks)
            self._check_captures(name)
            if len(names) > 1:
                self.checks[number:] = [
                    dataclasses.replace(check, found=f"{name}: {check.found}") for check in self.checks[number:]
                ]
        self._check_ledger()
        self.checks += check_clocks(self.clock_offsets_s)

    def _check_envoy(self, admin: str) -> None:
        read_facts = functools.partial(envoy.read_envoy_facts, admin, self.service)
        facts = self._read_or_fail(envoy.ENVOY_CHECKS, read_facts, "--envoy-admin or ABREAST_ENVOY_ADMIN", admin)
        others = facts.services if facts and not self.service else ()
        for service_facts in [
            facts,
            *(
                self._read_or_fail(
                    envoy.ENVOY_CHECKS, functools.partial(envoy.read_envoy_facts, admin, name), "--service"
                )
                for name in others[1:]
            ),
        ]:
            if service_facts is not None:
                self.envoy_facts.append(service_facts)
                self.checks += envoy.check_envoy(service_facts)

    def _check_captures(self, name: str) -> None:
        """Check the captures of a service, of any one without a name."""
        candidates = [name] if name else []
        read_facts = functools.partial(servers.read_redis_facts, self.settings.redis_url, candidates)
        facts = self._read_or_fail(servers.REDIS_CHECKS, read_facts, "--redis-url or ABREAST_REDIS_URL")
        if facts is None:
            return
        self.clock_offsets_s["Redis"] = facts.clock_offset_s
        only_service = next(iter(facts.reports)) if len(facts.reports) == 1 else ""
        service = name or only_service
        processes = [
            services.ServiceProcess.from_report(report, facts.server_time_s)
            for report in facts.reports.get(service, [])
        ]
        service_facts = [facts for facts in self.envoy_facts if facts.service == service] or self.envoy_facts
        mirrored_requests = sum(facts.mirrored_requests for facts in service_facts) if self.envoy_facts else None
        captures_off = {version for facts in service_facts for version in facts.captures_off}
        if processes or service not in facts.unregistered_shards:
            other_services = sorted(set(facts.reports) - {service})
            self.checks += services.check_services(service, processes, mirrored_requests, other_services, captures_off)
        self.checks += servers.check_registration(facts, service)
        if not any(check.part == servers.REDIS_CHECKS.part and check.name == "version" for check in self.checks):
            self.checks += servers.check_redis(facts)
        if processes or service in facts.unregistered_shards:
            self.checks += servers.check_join(facts, service, mirrored_requests, captures_off)

    def _check_ledger(self) -> None:
        read_facts = functools.partial(servers.read_postgres_facts, self.settings.postgres_url)
        facts = self._read_or_fail(servers.POSTGRES_CHECKS, read_facts, "--postgres-url or ABREAST_POSTGRES_URL")
        if facts is not None:
            self.clock_offsets_s["Postgres"] = facts.clock_offset_s
            self.checks += servers.check_postgres(facts, load_migrations()[-1].version)

    def _read_or_fail(
        self, check_factory: CheckFactory, read_facts: Callable[[], Facts], option: str, address: str = ""
    ) -> Facts | None:
        try:
            return read_facts()
        except UnreachableError as error:
            observation = f"can't be reached{f' at {address}' if address else ''}: {to_printable(str(error), 200)}"
            advice = f"start it, or set its address with {option}"
            self.checks.append(check_factory.make("reachable", observation, advice, fails=True))
            return None


def check_clocks(clock_offsets_s: Mapping[str, float]) -> Iterator[Check]:
    """Check the offsets of servers' clocks to this machine's clock; positive offsets are ahead."""
    large_offsets_s = {name: value for name, value in clock_offsets_s.items() if abs(value) > MAX_CLOCK_OFFSET_S}
    if clock_offsets_s and not large_offsets_s:
        max_offset_s = max(map(abs, clock_offsets_s.values()))
        names = " and ".join(clock_offsets_s)
        yield CLOCK_CHECKS.make("agree", f"{names} within {format_seconds(max(max_offset_s, 0.001))} of this machine")
    for name, value in large_offsets_s.items():
        observation = f"{name} is {format_seconds(abs(value))} {'ahead of' if value > 0 else 'behind'} this machine"
        advice = "synchronize the clocks (chrony, ntpd): otherwise times of requests are wrong"
        yield CLOCK_CHECKS.make(name, observation, advice, warns=True)
