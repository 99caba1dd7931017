"""Do both versions capture? What their processes last said of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from abreast_sidecar.cli.checks.check import Check, CheckFactory
from abreast_sidecar.cli.humane import format_count, format_quantity, format_seconds, to_printable

SERVICE_CHECKS = CheckFactory("services")
MAX_REPORT_AGE_S = 20.0  # seconds since the last report; one comes every five
SERVICE_VERSIONS = ("old", "new")
MIDDLEWARE_LINE = 'app.add_middleware(ParallelRunMiddleware, service="{}", redis_url=…)'


@dataclass(frozen=True)
class ServiceProcess:
    """`ago` is seconds since its last report, by Redis's clock against its own."""

    host: str
    release: str
    captures_by_version: dict[str, int]
    drops_by_reason: dict[str, int]
    queued_captures: int
    report_age_s: float

    @classmethod
    def from_report(cls, report: dict[str, Any], server_time_s: float) -> ServiceProcess:
        return cls(
            host=f"{report.get('host', '?')}:{report.get('pid', '?')}",
            release=str(report.get("release") or ""),
            captures_by_version=_parse_counts(report.get("versions")),
            drops_by_reason=_parse_counts(report.get("dropped")),
            queued_captures=int((report.get("queue") or {}).get("count", 0)),
            report_age_s=server_time_s - float(report.get("seen") or 0.0),
        )


def _parse_counts(value: object) -> dict[str, int]:
    return {str(name): int(number) for name, number in value.items()} if isinstance(value, dict) else {}


def check_services(
    service: str,
    processes: Sequence[ServiceProcess],
    mirrored_requests: int | None,
    other_services: Sequence[str],
) -> Iterator[Check]:
    """`mirrored`: requests that Envoy says it mirrored, None for unknown. `others`: further services in Redis."""
    if not processes:
        yield SERVICE_CHECKS.fail(
            "middleware",
            f"no process of {service or 'any service'} has reported to this Redis{_format_other_services(other_services)}",
            f"add it to both versions: {MIDDLEWARE_LINE.format(service or 'shop')}; the service's name and redis_url must be the same as here",
        )
        return
    live_processes = [process for process in processes if process.report_age_s < MAX_REPORT_AGE_S]
    yield _check_middleware(processes, live_processes)
    for version in SERVICE_VERSIONS:
        yield _check_version_captures(version, processes, service, mirrored_requests)
    yield from _check_drops(processes)


def _format_other_services(other_services: Sequence[str]) -> str:
    return f" (but of {', '.join(map(to_printable, other_services))})" if other_services else ""


def _check_middleware(processes: Sequence[ServiceProcess], live_processes: Sequence[ServiceProcess]) -> Check:
    observation = f"{format_quantity(len(live_processes), 'process', 'processes')} with it, heard from in the last {format_seconds(MAX_REPORT_AGE_S)}"
    if live_processes:
        return SERVICE_CHECKS.ok("middleware", observation)
    youngest_report_s = min(process.report_age_s for process in processes)
    return SERVICE_CHECKS.fail(
        "middleware",
        f"the last process was heard from {format_seconds(youngest_report_s)} ago",
        "are the versions running, and do they reach Redis?",
    )


def _check_version_captures(
    version: str, processes: Sequence[ServiceProcess], service: str, mirrored_requests: int | None
) -> Check:
    capturing_processes = [process for process in processes if process.captures_by_version.get(version)]
    live_processes = [process for process in capturing_processes if process.report_age_s < MAX_REPORT_AGE_S]
    captures = sum(process.captures_by_version[version] for process in capturing_processes)
    releases = sorted({process.release or "(no release said)" for process in live_processes})
    if live_processes:
        origin = f"release {', '.join(map(to_printable, releases))}, {format_quantity(len(live_processes), 'process', 'processes')}"
        return SERVICE_CHECKS.ok(version, f"{format_quantity(captures, 'capture')} from {origin}")
    if capturing_processes:
        return _check_silent_version(version, capturing_processes, processes, mirrored_requests)
    if mirrored_requests == 0:
        return SERVICE_CHECKS.warn(
            version, "nothing captured yet, since nothing was mirrored yet", "see what is said of Envoy above"
        )
    if any(process.captures_by_version for process in processes):
        observation = f"nothing captured, while {'new' if version == 'old' else 'old'} is"
    else:
        observation = "nothing captured"
    advice = f"is the middleware in {version}, with the same service and redis_url? {MIDDLEWARE_LINE.format(service)}"
    return SERVICE_CHECKS.fail(version, observation, advice)


def _check_silent_version(
    version: str,
    capturing_processes: Sequence[ServiceProcess],
    processes: Sequence[ServiceProcess],
    mirrored_requests: int | None,
) -> Check:
    observation = f"no process of {version} has reported for {format_seconds(min(process.report_age_s for process in capturing_processes))}"
    if mirrored_requests == 0:
        return SERVICE_CHECKS.warn(
            version, observation, "nothing was mirrored since Envoy started: is the version running?"
        )
    if any(
        process.report_age_s < MAX_REPORT_AGE_S and not process.captures_by_version for process in processes
    ):
        return SERVICE_CHECKS.warn(
            version,
            f"{observation}; processes that have captured nothing yet may be it",
            "send requests through Envoy, and look again",
        )
    return SERVICE_CHECKS.fail(version, observation, "is the middleware in it, and does it use this Redis?")


def _check_drops(processes: Sequence[ServiceProcess]) -> Iterator[Check]:
    drops_by_reason: dict[str, int] = {}
    for process in processes:
        for reason, number in process.drops_by_reason.items():
            drops_by_reason[reason] = drops_by_reason.get(reason, 0) + number
    queued_captures = sum(process.queued_captures for process in processes)
    if not sum(drops_by_reason.values()):
        yield SERVICE_CHECKS.ok(
            "drops", f"none; {format_quantity(queued_captures, 'capture')} on the way to Redis"
        )
        return
    observation = ", ".join(
        f"{to_printable(reason)} {format_count(number)}"
        for reason, number in sorted(drops_by_reason.items())
        if number
    )
    advice = (
        "queue: Redis is slow or was away; refused: it holds as much as it may; error: see the service's log"
    )
    yield SERVICE_CHECKS.warn("drops", f"captures dropped so far: {observation}", advice)
