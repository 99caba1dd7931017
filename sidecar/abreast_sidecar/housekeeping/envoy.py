"""Envoy's own count of sampled requests.

Tried on Envoy 1.40: a route's `upstream_rq_total` counts retries too, and misses requests for which no connection
came about; its `upstream_rq_completed` misses those whose client left. Each sampled request has exactly one copy for
`old_shadow` or `new_shadow`, and a copy is never tried again, so the copies are counted: those that were sent
(`upstream_rq_total`), and those that could not be (too many under way, no connection, no endpoint).
"""

from __future__ import annotations

import asyncio
import http.client
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import orjson

from abreast_sidecar.errors import SidecarError
from abreast_sidecar.housekeeping.counters import carried_on, fell
from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import Connection, statement

LOCK = 0x61627265 << 32  # and the address, so that of several Envoys none waits for another
TIMEOUT = 2.0  # seconds for one question
SHADOWS = ("old_shadow", "new_shadow")
COPIES = (*SHADOWS, "old_baseline")
SENT = "upstream_rq_total"
NOT_SENT = (
    "upstream_rq_pending_overflow",
    "upstream_rq_active_overflow",
    "upstream_rq_pending_failure_eject",
    "upstream_cx_none_healthy",
)
FILTER = rf"^cluster\.({'|'.join(COPIES)})\.({'|'.join((SENT, *NOT_SENT))})$"
NAME_LIMIT = 200  # characters
SLACK = 1.0  # seconds: Envoy says whole ones
LONGEST = 14 * 86_400.0  # seconds over which a count is spread
SHORTEST = 0.001
WATCHED: dict[
    str, tuple[float, float]
] = {}  # node → when this process looked last (monotonic), and its uptime then


class EnvoyError(SidecarError):
    """An Envoy's admin address does not answer as it should."""


@dataclass(frozen=True, slots=True)
class Look:
    """What an Envoy says of itself; `uptime` in seconds, `counts` since its start."""

    node: str
    service: str
    uptime: float
    counts: dict[str, int]


async def look(address: str) -> Look:
    """Ask an admin address, host:port. Raise EnvoyError."""
    address = address.removeprefix("http://").rstrip("/")
    info, stats = await asyncio.to_thread(
        _ask, address, "/server_info", f"/stats?format=json&filter={quote(FILTER)}"
    )
    try:
        node = info["node"]
        return Look(
            node=clean(f"{node['id']}@{address}", NAME_LIMIT),
            service=clean(node["cluster"], NAME_LIMIT),
            uptime=float(info["uptime_current_epoch"].rstrip("s")),
            counts=counts(stats["stats"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvoyError(f"{address} does not answer like an envoy's admin interface: {error!r}") from error


def _ask(address: str, *paths: str) -> Iterable[Any]:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        answers = []
        for path in paths:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != http.client.OK:
                raise EnvoyError(f"{address}{path.partition('?')[0]} answers {answer.status}")
            answers.append(orjson.loads(text))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EnvoyError(
            f"envoy's admin address {address} can't be read, check ABREAST_ENVOY_ADMIN: {error}"
        ) from error
    else:
        return answers
    finally:
        connection.close()


def counts(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sampled requests, and copies by the cluster that they were meant for."""
    values = {stat["name"]: int(stat["value"]) for stat in stats if "name" in stat and "value" in stat}
    found = dict.fromkeys(COPIES, 0)
    not_sent = 0
    for cluster in COPIES:
        lost = sum(values.get(f"cluster.{cluster}.{name}", 0) for name in NOT_SENT)
        found[cluster] = values.get(f"cluster.{cluster}.{SENT}", 0) + lost
        not_sent += lost
    return {**found, "sampled": sum(found[cluster] for cluster in SHADOWS), "not_sent": not_sent}


async def bring_envoy(connection: Connection, address: str) -> None:
    """Write an Envoy's counts, cumulative over its restarts. Any number of sidecars may do it at once; one does."""
    async with connection.transaction():
        cursor = await connection.execute(
            statement("lock_try"), {"lock": LOCK | zlib.crc32(address.encode())}
        )
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return
        seen = await look(address)
        key = {"node": seen.node, "service": seen.service, "sidecar_time": datetime.now(UTC)}
        cursor = await connection.execute(statement("envoy_report"), key)
        before = await cursor.fetchone()
        base, sums = sums_of(before, seen, sure=_watched(seen))
        last = {**seen.counts, "base": base}
        reports = {"totals": json_text(sums).decode(), "last_reading": json_text(last).decode()}
        await connection.execute(statement("envoy_report_set"), {**key, **reports})
        await connection.execute(statement("envoy_count_add"), _counted_since(before, seen, sums))


def _counted_since(before: Mapping[str, Any] | None, seen: Look, sums: Mapping[str, int]) -> dict[str, Any]:
    """What is new since the last look, or since its start where this is the first."""
    known, seconds = (
        (before["totals"].get("sampled", 0), before["age"]) if before else (0, seen.uptime + SLACK)
    )
    return {
        "service": seen.service,
        "sampled": sums["sampled"] - known,
        "seconds": min(max(seconds, SHORTEST), LONGEST),
    }


def _watched(seen: Look) -> bool:
    """Whether it has run since this process looked last, by a clock that nobody sets."""
    now = time.monotonic()
    before, up = WATCHED.get(seen.node, (now, float("inf")))
    WATCHED[seen.node] = (now, seen.uptime)
    return seen.uptime + SLACK >= up + (now - before)


def sums_of(
    before: Mapping[str, Any] | None, seen: Look, *, sure: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """`sure`: it is known to be the same life, whatever the clocks say."""
    if before is None:
        return carried_on({}, {}, seen.counts, same_life=True)
    last = {name: value for name, value in before["last_reading"].items() if name != "base"}
    # Envoy says whole seconds: of a restart within one, only what had counted more than the new life shows it.
    started_since = seen.uptime + 1 < before["age"]
    same_life = (sure or not started_since) and not fell(last, seen.counts)
    return carried_on(before["last_reading"].get("base", {}), last, seen.counts, same_life=same_life)
