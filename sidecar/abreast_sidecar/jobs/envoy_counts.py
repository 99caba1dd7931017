"""Counts the requests that each Envoy sampled, from its admin interface.

Checked with Envoy 1.40: a route's `upstream_rq_total` includes retries and misses requests without a connection, and
`upstream_rq_completed` misses requests whose client left. Each sampled request has exactly one copy for `old_shadow` or
`new_shadow`, and Envoy never retries a copy. So the counts are those of copies: sent ones (`upstream_rq_total`), and
unsent ones (too many in flight, no connection, no endpoint).
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
from abreast_sidecar.jobs.cumulative import continue_counters, was_reset
from abreast_sidecar.store.database import (
    AdvisoryLock,
    Connection,
    fetch_rows,
    load_statement,
    sanitise_text,
    to_json,
    try_lock,
)

ADMIN_TIMEOUT_S = 2.0  # for one request
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
MAX_NAME_CHARS = 200
UPTIME_SLACK_S = 1.0  # Envoy reports whole seconds
MAX_SPREAD_S = 14 * 86_400.0  # over which a count is spread
MIN_SPREAD_S = 0.001
LAST_UPTIMES: dict[str, tuple[float, float]] = {}  # node → time (monotonic) of the last reading, and the uptime then


class EnvoyError(SidecarError):
    """The admin interface of an Envoy fails or returns something else."""


@dataclass(frozen=True, slots=True)
class EnvoySnapshot:
    """A reading of an Envoy. `counts` are since its start."""

    node: str
    service: str
    uptime_s: float
    counts: dict[str, int]


async def read_envoy(address: str) -> EnvoySnapshot:
    """Read the admin interface at host:port. Raise EnvoyError."""
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
        raise EnvoyError(f"{address} is not the admin interface of an envoy: {error!r}") from error


def read_admin(address: str, *paths: str) -> list[Any]:
    """Return the JSON documents at paths of an Envoy's admin interface at host:port. Raise EnvoyError."""
    connection = http.client.HTTPConnection(address, timeout=ADMIN_TIMEOUT_S)
    try:
        contents = []
        for path in paths:
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read()
            if response.status != http.client.OK:
                raise EnvoyError(f"{address}{path.partition('?')[0]} returns status {response.status}")
            contents.append(orjson.loads(text))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EnvoyError(
            f"envoy's admin address {address} can't be read, check ABREAST_ENVOY_ADMIN: {error}"
        ) from error
    else:
        return contents
    finally:
        connection.close()


def count_copies(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of sampled requests, of unsent copies, and of copies by their cluster."""
    values = {stat["name"]: int(stat["value"]) for stat in stats if "name" in stat and "value" in stat}
    copies = dict.fromkeys(COPY_CLUSTERS, 0)
    unsent_total = 0
    for cluster in COPY_CLUSTERS:
        unsent = sum(values.get(f"cluster.{cluster}.{name}", 0) for name in UNSENT_COUNTERS)
        copies[cluster] = values.get(f"cluster.{cluster}.{SENT_COUNTER}", 0) + unsent
        unsent_total += unsent
    return {**copies, "sampled": sum(copies[cluster] for cluster in SHADOW_CLUSTERS), "not_sent": unsent_total}


async def collect_envoy_counts(connection: Connection, address: str) -> None:
    """Store the counts of an Envoy, cumulative over its restarts. One sidecar at a time does it."""
    async with connection.transaction():
        if not await try_lock(connection, AdvisoryLock.ENVOY | zlib.crc32(address.encode())):
            return
        snapshot = await read_envoy(address)
        key = {"node": snapshot.node, "service": snapshot.service, "sidecar_time": datetime.now(UTC)}
        rows = await fetch_rows(connection, "envoy_report", key)
        report = rows[0] if rows else None
        base, totals = sum_counts(report, snapshot, is_same_life=_has_kept_running(snapshot))
        last_reading = to_json({**snapshot.counts, "base": base}).decode()
        parameters = {**key, "totals": to_json(totals).decode(), "last_reading": last_reading}
        await connection.execute(load_statement("envoy_report_set"), parameters)
        await connection.execute(load_statement("envoy_count_add"), _compute_count_delta(report, snapshot, totals))


def _compute_count_delta(
    report: Mapping[str, Any] | None, snapshot: EnvoySnapshot, totals: Mapping[str, int]
) -> dict[str, Any]:
    """Return the requests since the last reading, or since the start of the Envoy, and the seconds to spread them over."""
    previous, seconds = (
        (report["totals"].get("sampled", 0), report["age"]) if report else (0, snapshot.uptime_s + UPTIME_SLACK_S)
    )
    return {
        "service": snapshot.service,
        "sampled": totals["sampled"] - previous,
        "seconds": min(max(seconds, MIN_SPREAD_S), MAX_SPREAD_S),
    }


def _has_kept_running(snapshot: EnvoySnapshot) -> bool:
    """Check by the monotonic clock whether the Envoy ran on since the last reading of this process."""
    now = time.monotonic()
    last_read, last_uptime_s = LAST_UPTIMES.get(snapshot.node, (now, float("inf")))
    LAST_UPTIMES[snapshot.node] = (now, snapshot.uptime_s)
    return snapshot.uptime_s + UPTIME_SLACK_S >= last_uptime_s + (now - last_read)


def sum_counts(
    report: Mapping[str, Any] | None, snapshot: EnvoySnapshot, *, is_same_life: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the counts of former lives, and the totals. `is_same_life`: the Envoy ran on, whatever the clocks show."""
    if report is None:
        return continue_counters({}, {}, snapshot.counts, is_same_life=True)
    previous = {name: value for name, value in report["last_reading"].items() if name != "base"}
    # The uptime has whole seconds: a restart within one shows only in counters that fell.
    has_restarted = snapshot.uptime_s + 1 < report["age"]
    continues = (is_same_life or not has_restarted) and not was_reset(previous, snapshot.counts)
    return continue_counters(report["last_reading"].get("base", {}), previous, snapshot.counts, is_same_life=continues)
