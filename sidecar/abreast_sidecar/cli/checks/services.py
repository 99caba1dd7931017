"""Do both versions capture? What their processes last said of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from abreast_sidecar.cli.checks.check import Check, Part
from abreast_sidecar.cli.humane import count, counted, printable, seconds

SERVICE = Part("services")
ALIVE = 20.0  # seconds since the last report; one comes every five
VERSIONS = ("old", "new")
LINE = 'app.add_middleware(ParallelRunMiddleware, service="{}", redis_url=…)'


@dataclass(frozen=True)
class Process:
    """`ago` is seconds since its last report, by Redis's clock against its own."""

    host: str
    release: str
    versions: dict[str, int]
    dropped: dict[str, int]
    queued: int
    ago: float

    @classmethod
    def of(cls, report: dict[str, Any], now: float) -> Process:
        return cls(
            host=f"{report.get('host', '?')}:{report.get('pid', '?')}",
            release=str(report.get("release") or ""),
            versions=_counts(report.get("versions")),
            dropped=_counts(report.get("dropped")),
            queued=int((report.get("queue") or {}).get("count", 0)),
            ago=now - float(report.get("seen") or 0.0),
        )


def _counts(value: object) -> dict[str, int]:
    return {str(name): int(number) for name, number in value.items()} if isinstance(value, dict) else {}


def judge(
    service: str, processes: Sequence[Process], mirrored: int | None, others: Sequence[str]
) -> Iterator[Check]:
    """`mirrored`: requests that Envoy says it mirrored, None for unknown. `others`: further services in Redis."""
    if not processes:
        yield SERVICE.fail(
            "middleware",
            f"no process of {service or 'any service'} has reported to this Redis{_named(others)}",
            f"add it to both versions: {LINE.format(service or 'shop')}; the service's name and redis_url must be the same as here",
        )
        return
    alive = [process for process in processes if process.ago < ALIVE]
    yield _running(processes, alive)
    for version in VERSIONS:
        yield _captured(version, processes, service, mirrored)
    yield from _drops(processes)


def _named(others: Sequence[str]) -> str:
    return f" (but of {', '.join(map(printable, others))})" if others else ""


def _running(processes: Sequence[Process], alive: Sequence[Process]) -> Check:
    found = f"{counted(len(alive), 'process', 'processes')} with it, heard from in the last {seconds(ALIVE)}"
    if alive:
        return SERVICE.ok("middleware", found)
    last = min(process.ago for process in processes)
    return SERVICE.fail(
        "middleware",
        f"the last process was heard from {seconds(last)} ago",
        "are the versions running, and do they reach Redis?",
    )


def _captured(version: str, processes: Sequence[Process], service: str, mirrored: int | None) -> Check:
    ever = [process for process in processes if process.versions.get(version)]
    mine = [process for process in ever if process.ago < ALIVE]
    captures = sum(process.versions[version] for process in ever)
    releases = sorted({process.release or "(no release said)" for process in mine})
    if mine:
        who = f"release {', '.join(map(printable, releases))}, {counted(len(mine), 'process', 'processes')}"
        return SERVICE.ok(version, f"{counted(captures, 'capture')} from {who}")
    if ever:
        return _silent(version, ever, processes, mirrored)
    if mirrored == 0:
        return SERVICE.warn(
            version, "nothing captured yet, since nothing was mirrored yet", "see what is said of Envoy above"
        )
    if any(process.versions for process in processes):
        found = f"nothing captured, while {'new' if version == 'old' else 'old'} is"
    else:
        found = "nothing captured"
    advice = f"is the middleware in {version}, with the same service and redis_url? {LINE.format(service)}"
    return SERVICE.fail(version, found, advice)


def _silent(
    version: str, ever: Sequence[Process], processes: Sequence[Process], mirrored: int | None
) -> Check:
    found = f"no process of {version} has reported for {seconds(min(process.ago for process in ever))}"
    if mirrored == 0:
        return SERVICE.warn(
            version, found, "nothing was mirrored since Envoy started: is the version running?"
        )
    if any(process.ago < ALIVE and not process.versions for process in processes):
        return SERVICE.warn(
            version,
            f"{found}; processes that have captured nothing yet may be it",
            "send requests through Envoy, and look again",
        )
    return SERVICE.fail(version, found, "is the middleware in it, and does it use this Redis?")


def _drops(processes: Sequence[Process]) -> Iterator[Check]:
    reasons: dict[str, int] = {}
    for process in processes:
        for reason, number in process.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    queued = sum(process.queued for process in processes)
    if not sum(reasons.values()):
        yield SERVICE.ok("drops", f"none; {counted(queued, 'capture')} on the way to Redis")
        return
    found = ", ".join(
        f"{printable(reason)} {count(number)}" for reason, number in sorted(reasons.items()) if number
    )
    advice = (
        "queue: Redis is slow or was away; refused: it holds as much as it may; error: see the service's log"
    )
    yield SERVICE.warn("drops", f"captures dropped so far: {found}", advice)
