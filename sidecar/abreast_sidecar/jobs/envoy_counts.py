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
from abreast_sidecar.jobs.detectors import continue_counters, was_reset
from abreast_sidecar.store.database import Connection, load_statement, sanitise_text, to_json

ENVOY_LOCK_KEY = 0x61627265 << 32  # and the address, so that of several Envoys none waits for another
ADMIN_TIMEOUT_S = 2.0  # seconds for one question
SHADOW_CLUSTERS = ("old_shadow", "new_shadow")
COPY_CLUSTERS = (*SHADOW_CLUSTERS, "old_baseline")
SENT_COUNTER = "upstream_rq_total"
UNSENT_COUNTERS = (
    "upstream_rq_pending_overflow",
    "upstream_rq_active_overflow",
    "upstream_rq_pending_failure_eject",
    "upstream_cx_none_healthy",
)
STATS_FILTER = rf"^cluster\.({'|'.join(COPY_CLUSTERS)})\.({'|'.join((SENT_COUNTER, *UNSENT_COUNTERS))})$"
MAX_NAME_CHARS = 200  # characters
UPTIME_SLACK_S = 1.0  # seconds: Envoy says whole ones
MAX_SPREAD_S = 14 * 86_400.0  # seconds over which a count is spread
MIN_SPREAD_S = 0.001
LAST_UPTIMES: dict[
    str, tuple[float, float]
] = {}  # node → when this process looked last (monotonic), and its uptime then


class EnvoyError(SidecarError):
    """An Envoy's admin address does not answer as it should."""


@dataclass(frozen=True, slots=True)
class EnvoySnapshot:
    """What an Envoy says of itself; `uptime` in seconds, `counts` since its start."""

    node: str
    service: str
    uptime_s: float
    counts: dict[str, int]


async def read_envoy(address: str) -> EnvoySnapshot:
    """Ask an admin address, host:port. Raise EnvoyError."""
    address = address.removeprefix("http://").rstrip("/")
    info, stats = await asyncio.to_thread(
        read_admin, address, "/server_info", f"/stats?format=json&filter={quote(STATS_FILTER)}"
    )
    try:
        node = info["node"]
        return EnvoySnapshot(
            node=sanitise_text(f"{node['id']}@{address}", MAX_NAME_CHARS),
            service=sanitise_text(node["cluster"], MAX_NAME_CHARS),
            uptime_s=float(info["uptime_current_epoch"].rstrip("s")),
            counts=count_copies(stats["stats"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvoyError(f"{address} does not answer like an envoy's admin interface: {error!r}") from error


def read_admin(address: str, *paths: str) -> list[Any]:
    """Return the JSON documents at paths of an Envoy's admin interface at host:port. Raise EnvoyError."""
    connection = http.client.HTTPConnection(address, timeout=ADMIN_TIMEOUT_S)
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


def count_copies(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sampled requests, and copies by the cluster that they were meant for."""
    values = {stat["name"]: int(stat["value"]) for stat in stats if "name" in stat and "value" in stat}
    copies = dict.fromkeys(COPY_CLUSTERS, 0)
    unsent_total = 0
    for cluster in COPY_CLUSTERS:
        unsent = sum(values.get(f"cluster.{cluster}.{name}", 0) for name in UNSENT_COUNTERS)
        copies[cluster] = values.get(f"cluster.{cluster}.{SENT_COUNTER}", 0) + unsent
        unsent_total += unsent
    return {**copies, "sampled": sum(copies[cluster] for cluster in SHADOW_CLUSTERS), "not_sent": unsent_total}


async def collect_envoy_counts(connection: Connection, address: str) -> None:
    """Write an Envoy's counts, cumulative over its restarts. Any number of sidecars may do it at once; one does."""
    async with connection.transaction():
        cursor = await connection.execute(
            load_statement("lock_try"), {"lock": ENVOY_LOCK_KEY | zlib.crc32(address.encode())}
        )
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return
        snapshot = await read_envoy(address)
        key = {"node": snapshot.node, "service": snapshot.service, "sidecar_time": datetime.now(UTC)}
        cursor = await connection.execute(load_statement("envoy_report"), key)
        report = await cursor.fetchone()
        base, sums = sum_counts(report, snapshot, is_same_life=_has_kept_running(snapshot))
        stored_counts = {**snapshot.counts, "base": base}
        reports = {"totals": to_json(sums).decode(), "last_reading": to_json(stored_counts).decode()}
        await connection.execute(load_statement("envoy_report_set"), {**key, **reports})
        await connection.execute(load_statement("envoy_count_add"), _compute_count_delta(report, snapshot, sums))


def _compute_count_delta(
    report: Mapping[str, Any] | None, snapshot: EnvoySnapshot, sums: Mapping[str, int]
) -> dict[str, Any]:
    """What is new since the last look, or since its start where this is the first."""
    previous, seconds = (
        (report["totals"].get("sampled", 0), report["age"]) if report else (0, snapshot.uptime_s + UPTIME_SLACK_S)
    )
    return {
        "service": snapshot.service,
        "sampled": sums["sampled"] - previous,
        "seconds": min(max(seconds, MIN_SPREAD_S), MAX_SPREAD_S),
    }


def _has_kept_running(snapshot: EnvoySnapshot) -> bool:
    """Whether it has run since this process looked last, by a clock that nobody sets."""
    now = time.monotonic()
    last_read, last_uptime_s = LAST_UPTIMES.get(snapshot.node, (now, float("inf")))
    LAST_UPTIMES[snapshot.node] = (now, snapshot.uptime_s)
    return snapshot.uptime_s + UPTIME_SLACK_S >= last_uptime_s + (now - last_read)


def sum_counts(
    report: Mapping[str, Any] | None, snapshot: EnvoySnapshot, *, is_same_life: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """`sure`: it is known to be the same life, whatever the clocks say."""
    if report is None:
        return continue_counters({}, {}, snapshot.counts, is_same_life=True)
    previous = {name: value for name, value in report["last_reading"].items() if name != "base"}
    # Envoy says whole seconds: of a restart within one, only what had counted more than the new life shows it.
    has_restarted = snapshot.uptime_s + 1 < report["age"]
    continues = (is_same_life or not has_restarted) and not was_reset(previous, snapshot.counts)
    return continue_counters(report["last_reading"].get("base", {}), previous, snapshot.counts, is_same_life=continues)
