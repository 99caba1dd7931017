"""Copies counters from elsewhere to the ledger: of service processes and shards, from Redis, and of Envoys.

Checked with Envoy 1.40: a route's `upstream_rq_total` includes retries and misses requests without a connection, and
`upstream_rq_completed` misses requests whose client left. So the script that sends the copies counts the sampled requests,
and those that get no copy because of their body. It counts them by stream, one for each worker thread, and pair ids have
the stream and the number of the request. If Envoy ends, they show what it counted after the last reading. The script of
the copies' clusters counts sent copies, and those that it drops because they would queue (`upstream_rq_total` includes
some of these). Envoy's clusters count other unsent ones: too many in flight or no endpoint, before the script runs, and
no connection, after it. A request whose client left before
the response is sampled too, but has no copy. The capture of its live response shows that only if the application noticed:
a Starlette endpoint that does not stream answers to nobody. So the sampled requests without a sent copy are counted too.
The same script counts responses, because `upstream_rq_completed` includes those that Envoy makes.
"""

from __future__ import annotations

import asyncio
import http.client
import math
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypedDict
from urllib.parse import quote

import orjson
from redis.asyncio import Redis

from abreast.protocol.join import (
    DUPLICATE,
    JOINED,
    LATE,
    RECEIVED,
    REJECTED_BYTES,
    REJECTED_PAIRS,
    TIMED_OUT,
    reports_key,
)
from abreast_sidecar.envoy.settings import name_scope, rule_scope
from abreast_sidecar.errors import SidecarError
from abreast_sidecar.redis_client import list_shards, load_script, map_redis_errors
from abreast_sidecar.store.database import (
    AdvisoryLock,
    Connection,
    exclusive,
    execute,
    fetch_rows,
    sanitise_text,
    to_json,
    try_lock,
)

StaleReports = dict[str, dict[str, bytes]]  # by service and process
CounterValues = Mapping[str, int]

SHARD_COUNTERS = (RECEIVED, DUPLICATE, LATE, REJECTED_PAIRS, REJECTED_BYTES, JOINED, TIMED_OUT)
SHARD_GAUGES = ("bytes", "waiting", "ready")
LIFE_FIELD = "life"  # identifies the life of the counters: a Redis that lost its data begins a new one
STALE_REPORT_S = 3600  # the report of a dead process leaves Redis after it
MAX_PROCESS_ID_CHARS = 200
DELETE_REPORT_SCRIPT = load_script("delete_report")
READ_STATS_SCRIPT = load_script("read_stats")
NO_REPORTS: StaleReports = {}
ADMIN_LAYER = "admin"
LIVE_CLUSTERS = ("old", "new_or_old")
ADMIN_TIMEOUT_S = 2.0  # for one request
SHADOW_CLUSTERS = ("old_shadow", "new_shadow")  # each sampled request has one copy to one of them
BASELINE_CLUSTERS = ("old_baseline", "new_baseline")
COPY_CLUSTERS = (*SHADOW_CLUSTERS, *BASELINE_CLUSTERS)
SENT_COUNTER = "lua.copy.sent"
SHED_COUNTER = "lua.copy.shed"
EJECTED_COUNTER = "upstream_rq_pending_failure_eject"  # part of the sent copies
ANSWERED_COUNTER = "lua.copy.answered"
ACTIVE_GAUGE = "upstream_rq_active"
OVERRIDES_GAUGE = "runtime.admin_overrides_active"
NO_COUNTERS = frozenset({"base", "in_flight", "overrides"})  # in the last reading
UNSENT_COUNTERS = (
    "upstream_rq_pending_overflow",
    "upstream_rq_active_overflow",
    "upstream_cx_none_healthy",
    SHED_COUNTER,
)
SCRIPT_PREFIX = "http.ingress.lua.copies."
SAMPLED_PREFIX = SCRIPT_PREFIX + "sampled."
RULE_PREFIX, NOT_QUERY_SUFFIX = (
    "rule.",
    ".not_query",
)  # sampled requests of rules, and those that a rule excludes by the body
TROUBLES = ("shed_failing", "shed_queueing")  # live requests of a version fail or queue, so it gets no copies
NOT_SAMPLED = (
    *TROUBLES,
    "over_memory",
    "logged_in",
)  # counters of requests that the shares select and the script drops
TOO_LARGE_COUNTER = SCRIPT_PREFIX + "too_large"  # requests whose body turned out to exceed the limits
# The script that captures counts in each cluster. Envoy counts calls to the collector without a response as 5xx.
CAPTURE_SCRIPT_PATTERN = re.compile(r"cluster\.\w+\.lua\.capture\.(sent|over_memory)")
# In an Envoy with several services, the names of a service start with its scope, such as `shop-`.
SCOPE = r"([\w-]+-)?"
NAME = r"[^.-]+"  # after the scope: without a hyphen, so that `shop-` is not the start of the names of the service `shop-x`
UNDELIVERED_COUNTERS = ("cluster.collector.upstream_rq_4xx", "cluster.collector.upstream_rq_5xx")
STATS_FILTER = (
    rf"^cluster\.{SCOPE}({'|'.join(COPY_CLUSTERS)})\.({'|'.join((SENT_COUNTER, EJECTED_COUNTER, *UNSENT_COUNTERS))})$"
    rf"|^cluster\.{SCOPE}new_shadow\.({ANSWERED_COUNTER}|{ACTIVE_GAUGE})$"
    rf"|^http\.ingress\.lua\.{SCOPE}copies\.|^cluster\.{SCOPE}\w+\.lua\.capture\.(sent|over_memory)$"
    rf"|^cluster\.{SCOPE}collector\.upstream_rq_[45]xx$"
    rf"|^http\.ingress\.downstream_rq_(completed|5xx)$|^http\.{SCOPE}drill\.fault\."
    r"|^vhost\..*\.upstream_rq_(completed|5xx)$"
    rf"|^{re.escape(OVERRIDES_GAUGE)}$"
)
USER_COUNTERS = {
    "responses": ("http.ingress.downstream_rq_completed",),
    "server_errors": ("http.ingress.downstream_rq_5xx",),
    "faults": ("http.drill.fault.aborts_injected", "http.drill.fault.delays_injected"),
}
SHADOW_CALLS = "shadow_calls"  # a route of requests that are not users'
ROUTE_USER_COUNTERS = {"upstream_rq_completed": "downstream_rq_completed", "upstream_rq_5xx": "downstream_rq_5xx"}
UNSEEN = "unseen"  # in the totals: requests of the last moments of former Envoys, which no reading and no capture shows
UNSEEN_RATE_S = 60.0  # before the last reading, for the rate
MAX_NAME_CHARS = 200
UPTIME_SLACK_S = 1.0  # Envoy reports whole seconds
MAX_SPREAD_S = 14 * 86_400.0  # over which a count is spread
MIN_SPREAD_S = 0.001
LAST_UPTIMES: dict[
    tuple[str, str], tuple[float, float]
] = {}  # node and service → time (monotonic) of the last reading, and the uptime then


class ShardReport(TypedDict, total=False):
    life: str
    base: dict[str, int]
    last: dict[str, int]


async def collect_reports(connection: Connection, client: Redis) -> None:
    """Copy all reports, and delete stale ones from Redis once the copy is committed."""
    for service, stale in (await _copy_reports(connection, client)).items():
        with map_redis_errors():
            for process, report in stale.items():  # deletes only this report: the process may report again
                await DELETE_REPORT_SCRIPT.run(client, [reports_key(service)], [process, report])


@exclusive(AdvisoryLock.REPORTS, otherwise=NO_REPORTS)  # otherwise an older reading may overwrite a newer one
async def _copy_reports(connection: Connection, client: Redis) -> StaleReports:
    """Return the stale reports by service and process."""
    with map_redis_errors():
        shard_keys = await list_shards(client)
    for keys in shard_keys:
        with map_redis_errors():
            raw, waiting, ready = await READ_STATS_SCRIPT.run(
                client, [keys.stats, keys.due, keys.ready], [uuid.uuid4().hex]
            )
        texts = [part.decode() for part in raw]
        stats = {**dict(zip(texts[::2], texts[1::2], strict=True)), "waiting": waiting, "ready": ready}
        key = {"service": keys.service, "shard": keys.shard}
        rows = await fetch_rows(connection, "shard_report", key)
        report = _build_shard_report(rows[0]["report"] if rows else {}, stats)
        await execute(connection, "shard_report_set", {**key, "report": to_json(report)})
    services = {keys.service for keys in shard_keys}
    return {service: await _copy_process_reports(connection, client, service) for service in services}


def _build_shard_report(previous: ShardReport, stats: Mapping[str, Any]) -> dict[str, Any]:
    current = {name: int(stats.get(name, 0)) for name in SHARD_COUNTERS}
    life = stats[LIFE_FIELD]
    base, sums = continue_counters(
        previous.get("base", {}), previous.get("last", {}), current, is_same_life=previous.get("life", life) == life
    )
    gauges = {name: int(stats.get(name, 0)) for name in SHARD_GAUGES}
    return {**sums, **gauges, "life": life, "base": base, "last": current}


async def _copy_process_reports(connection: Connection, client: Redis, service: str) -> dict[str, bytes]:
    """Return the reports that have not changed for STALE_REPORT_S, by process."""
    with map_redis_errors():
        raw: dict[bytes, bytes] = await client.hgetall(reports_key(service))  # type: ignore[assignment]
    names: dict[str, bytes] = {}  # name in Redis by the id in the ledger
    rows = []
    for name, text in raw.items():
        with suppress(orjson.JSONDecodeError):
            report = orjson.loads(text)
            if isinstance(report, dict):
                id_ = sanitise_text(name.decode(errors="replace"), MAX_PROCESS_ID_CHARS)
                names[id_] = name
                rows.append({"id": id_, "report": report})
    if not rows:
        return {}
    parameters = {"service": service, "rows": to_json(rows), "stale": STALE_REPORT_S}
    stale_ids = {row["id"] for row in await fetch_rows(connection, "process_reports_set", parameters)}
    return {names[id_].decode(errors="replace"): raw[names[id_]] for id_ in stale_ids if id_ in names}


class EnvoyError(SidecarError):
    """The admin interface of an Envoy fails or returns something else."""


@dataclass(frozen=True, slots=True)
class EnvoySnapshot:
    """A reading of an Envoy. `counts` are since its start, and `streams` has the sampled requests of each stream.

    `in_flight`: copies that new has not answered yet. `overrides`: 1 if the admin interface sets runtime values.
    """

    node: str
    service: str
    uptime_s: float
    counts: dict[str, int]
    streams: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    overrides: int = 0


async def read_envoy(address: str) -> list[EnvoySnapshot]:
    """Read the admin interface at host:port. Return a snapshot for each service. Raise EnvoyError."""
    address = address.removeprefix("http://").rstrip("/")
    info, stats = await asyncio.to_thread(
        read_admin, address, "/server_info", f"/stats?format=json&filter={quote(STATS_FILTER)}"
    )
    try:
        scopes, snapshots = list_scopes(info), []
        overrides = dict.fromkeys(scopes, read_stats(stats["stats"]).get(OVERRIDES_GAUGE, 0))
        if len(scopes) > 1 and any(overrides.values()):  # the gauge is for all services
            (runtime,) = await asyncio.to_thread(read_admin, address, "/runtime")
            overrides = {service: int(bool(_find_overrides(runtime, scope))) for service, scope in scopes.items()}
        for service, scope in scopes.items():
            service_stats = select_service(stats["stats"], scope)
            snapshots.append(
                EnvoySnapshot(
                    node=sanitise_text(f"{info['node']['id']}@{address}", MAX_NAME_CHARS),
                    service=sanitise_text(service, MAX_NAME_CHARS),
                    uptime_s=float(info["uptime_current_epoch"].rstrip("s")),
                    counts={**count_copies(service_stats), **count_users(service_stats)},
                    streams=count_streams(service_stats),
                    in_flight=read_stats(service_stats).get(f"cluster.new_shadow.{ACTIVE_GAUGE}", 0),
                    overrides=overrides[service],
                )
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvoyError(f"{address} is not the admin interface of an envoy: {error!r}") from error
    return snapshots


def list_scopes(info: Mapping[str, Any]) -> dict[str, str]:
    """Return the services of an Envoy, and the start of the names of each, from its /server_info."""
    node = info["node"]
    services = node.get("metadata", {}).get("abreast", {}).get("services")
    return {service: name_scope(service) for service in services} if services else {node["cluster"]: ""}


def list_captures_off(info: Mapping[str, Any], service: str) -> list[str]:
    """Return the versions that nothing captures, from the /server_info of an Envoy."""
    return list(info["node"].get("metadata", {}).get("abreast", {}).get("captures_off", {}).get(service, ()))


def select_service(stats: Iterable[Mapping[str, Any]], scope: str) -> list[Mapping[str, Any]]:
    """Return the statistics of a service under the names that the only service of an Envoy has.

    The listener counts the responses of all services. So those of one service are the responses of its routes.
    """
    if not scope:
        return list(stats)
    pattern = re.compile(rf"(cluster\.|http\.|http\.ingress\.lua\.|vhost\..+\.route\.){scope}({NAME}\..+)")
    values = Counter[str]()
    for name, value in read_stats(stats).items():
        if (match := pattern.fullmatch(name)) is None:
            continue
        prefix, rest = match[1], match[2]
        if prefix.startswith("vhost."):
            prefix = "vhost.service.route."
            route, _, counter_name = rest.rpartition(".")
            if route != SHADOW_CALLS and (counter := ROUTE_USER_COUNTERS.get(counter_name)):
                values[f"http.ingress.{counter}"] += value
        values[prefix + rest] += value
    return [{"name": name, "value": value} for name, value in values.items()]


async def describe_overrides(address: str, service: str) -> str:
    """Describe the values that the admin layer of an Envoy of the service sets, empty without any. Raise EnvoyError."""
    address = address.removeprefix("http://").rstrip("/")
    info, runtime = await asyncio.to_thread(read_admin, address, "/server_info", "/runtime")
    try:
        if (scope := list_scopes(info).get(service)) is None:
            return ""
        overrides = _find_overrides(runtime, scope)
        old, new = (float(runtime["entries"][f"abreast.weight.{scope}{name}"]["final_value"]) for name in LIVE_CLUSTERS)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise EnvoyError(f"{address} is not the admin interface of an envoy: {error!r}") from error
    if not overrides:
        return ""
    share = f"{new / (old + new):.4g}" if old + new else "unknown"
    return (
        f"the admin interface of the Envoy {info['node']['id']} overrides the sidecar: {', '.join(sorted(overrides))}; "
        f"its share of users on new is {share}; remove them with POST /runtime_modify?KEY= for each key, on its socket"
    )


def _find_overrides(runtime: Mapping[str, Any], scope: str) -> list[str]:
    """Return the values of a service that the admin layer sets, from /runtime."""
    admin_layer = runtime["layers"].index(ADMIN_LAYER)
    pattern = re.compile(rf"abreast\.(rule\.{rule_scope(scope)}.+|[a-z]+\.{scope}{NAME}(\..+)?)")
    return [
        f"{name}={entry['final_value']}"
        for name, entry in runtime["entries"].items()
        if entry["layer_values"][admin_layer] and pattern.fullmatch(name)
    ]


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


def read_stats(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the counters and gauges. Histograms and texts are others."""
    return {stat["name"]: stat["value"] for stat in stats if "name" in stat and isinstance(stat.get("value"), int)}


def count_streams(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of sampled requests by stream."""
    values = read_stats(stats)
    return {
        name.removeprefix(SAMPLED_PREFIX): count for name, count in values.items() if name.startswith(SAMPLED_PREFIX)
    }


def count_copies(stats: Collection[Mapping[str, Any]]) -> dict[str, int]:
    """Return the numbers of sampled requests, of unsent copies, of sent and answered ones, of copies by cluster, and of captures."""
    values = read_stats(stats)
    copies = dict.fromkeys(COPY_CLUSTERS, 0)
    unsent_total = 0
    for cluster in COPY_CLUSTERS:
        unsent = sum(values.get(f"cluster.{cluster}.{name}", 0) for name in UNSENT_COUNTERS)
        copies[cluster] = values.get(f"cluster.{cluster}.{SENT_COUNTER}", 0) + unsent
        unsent_total += unsent + values.get(f"cluster.{cluster}.{EJECTED_COUNTER}", 0)
    unsent_total += values.get(TOO_LARGE_COUNTER, 0)
    captures = {"sent": 0, "over_memory": 0}
    for name, value in values.items():
        if match := CAPTURE_SCRIPT_PATTERN.fullmatch(name):
            captures[match[1]] += value
    return {
        **copies,
        "sampled": sum(count_streams(stats).values()),
        "not_sent": unsent_total,
        "new_sent": values.get(f"cluster.new_shadow.{SENT_COUNTER}", 0),
        "new_ejected": values.get(f"cluster.new_shadow.{EJECTED_COUNTER}", 0),
        "new_answered": values.get(f"cluster.new_shadow.{ANSWERED_COUNTER}", 0),
        "shadows_sent": _sum_shadows(values, SENT_COUNTER),
        "shadows_ejected": _sum_shadows(values, EJECTED_COUNTER),
        "shed_queue": _sum_shadows(values, SHED_COUNTER),
        "shed_baseline": sum(values.get(f"cluster.{cluster}.{SHED_COUNTER}", 0) for cluster in BASELINE_CLUSTERS)
        + sum(values.get(f"{SCRIPT_PREFIX}baseline_{reason}", 0) for reason in TROUBLES),
        **{reason: values.get(f"{SCRIPT_PREFIX}{reason}", 0) for reason in NOT_SAMPLED},
        "too_large": values.get(TOO_LARGE_COUNTER, 0),
        **_count_rules(values),
        "captures_sent": captures["sent"],
        "captures_over_memory": captures["over_memory"],
        "captures_undelivered": sum(values.get(name, 0) for name in UNDELIVERED_COUNTERS),
    }


def _count_rules(values: CounterValues) -> dict[str, int]:
    prefix = SCRIPT_PREFIX + RULE_PREFIX
    return {name.removeprefix(SCRIPT_PREFIX): value for name, value in values.items() if name.startswith(prefix)}


def count_users(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the responses to users, those with a server error, and the requests that got the fault of a drill."""
    values = read_stats(stats)
    return {name: sum(values.get(stat, 0) for stat in stats) for name, stats in USER_COUNTERS.items()}


def _sum_shadows(values: CounterValues, name: str) -> int:
    return sum(values.get(f"cluster.{cluster}.{name}", 0) for cluster in SHADOW_CLUSTERS)


async def collect_envoy_counts(connection: Connection, address: str) -> bool:
    """Store the counts of an Envoy, cumulative over its restarts. One sidecar at a time does it.

    Return whether the Envoy sampled requests since the last reading, or its admin interface overrides the sidecar. Each
    service has a separate reading and transaction, because a worker locks rows of several services in any order.
    """
    stored: set[str] = set()
    is_busy = False
    while True:
        async with connection.transaction():
            if not await try_lock(connection, AdvisoryLock.ENVOY | zlib.crc32(address.encode())):
                return False
            pending = [snapshot for snapshot in await read_envoy(address) if snapshot.service not in stored]
            for snapshot in pending[:1]:
                is_busy |= await _store_snapshot(connection, snapshot)
                stored.add(snapshot.service)
        if len(pending) <= 1:
            return is_busy


async def _store_snapshot(connection: Connection, snapshot: EnvoySnapshot) -> bool:
    key = {"node": snapshot.node, "service": snapshot.service, "sidecar_time": datetime.now(UTC)}
    rows = await fetch_rows(connection, "envoy_report", key)
    report = rows[0] if rows else None
    base, totals = sum_counts(report, snapshot, is_same_life=_has_kept_running(snapshot))
    if report and base != report["last_reading"].get("base", {}):
        base[UNSEEN] = base.get(UNSEEN, 0) + await _estimate_unseen(connection, snapshot, report["age"])
        totals[UNSEEN] = base[UNSEEN]
    totals["read"] = totals["sampled"]
    totals["sampled"] = await _count_sampled(connection, snapshot)
    counts = {
        "totals": to_json(totals),
        "last_reading": to_json(
            {**snapshot.counts, "base": base, "in_flight": snapshot.in_flight, "overrides": snapshot.overrides}
        ),
    }
    await execute(connection, "envoy_report_set", {**key, **counts})
    delta = _compute_count_delta(report, snapshot, totals)
    await execute(connection, "envoy_count_add", delta)
    return bool(delta["sampled"] or snapshot.overrides)


async def _estimate_unseen(connection: Connection, snapshot: EnvoySnapshot, age_s: float) -> int:
    """Return the requests that a former Envoy may have sampled after its last reading, by the rate before it."""
    parameters = {"service": snapshot.service, "seconds": age_s + UNSEEN_RATE_S}
    (row,) = await fetch_rows(connection, "envoy_peak_rate", parameters)
    return math.ceil(float(row["rate"]) * max(age_s - snapshot.uptime_s, 0.0))


async def _count_sampled(connection: Connection, snapshot: EnvoySnapshot) -> int:
    """Return the requests that a node sampled: by this reading, by earlier ones, and by the numbers in pair ids."""
    key = {"node": snapshot.node, "service": snapshot.service}
    rows = [{"stream": stream, "counted": count} for stream, count in snapshot.streams.items()]
    await execute(connection, "envoy_streams_set", {**key, "rows": to_json(rows)})
    await execute(connection, "envoy_streams_adopt", key)
    await execute(connection, "envoy_reports_raise", key)
    (total,) = await fetch_rows(connection, "envoy_stream_total", key)
    return int(total["sampled"])


def _compute_count_delta(
    report: Mapping[str, Any] | None, snapshot: EnvoySnapshot, totals: Mapping[str, int]
) -> dict[str, Any]:
    """Return the requests since the last reading, or since the start of the Envoy, and the seconds to spread them over.

    `without_copy` counts sampled requests whose copy was not sent, by readings alone, and `unanswered` copies that new did
    not answer. Both are negative if what was in flight at the last reading has a copy or an answer by now.
    """
    previous: Mapping[str, int] = {}
    seconds = snapshot.uptime_s + UPTIME_SLACK_S
    if report:
        previous, seconds = report["totals"], report["age"]
    seconds = min(max(seconds, MIN_SPREAD_S), MAX_SPREAD_S)
    delta = {name: value - previous.get(name, 0) for name, value in totals.items()}
    return {
        "service": snapshot.service,
        "sampled": delta["sampled"],
        "without_copy": delta["read"] - delta["shadows_sent"] + delta["shadows_ejected"],
        "unanswered": delta["new_sent"] - delta["new_ejected"] - delta["new_answered"],
        "shed": delta["shed_queue"],
        "not_sampled": sum(delta[reason] for reason in NOT_SAMPLED),
        "not_query": sum(value for name, value in delta.items() if name.endswith(NOT_QUERY_SUFFIX)),
        "seconds": seconds,
    }


def _has_kept_running(snapshot: EnvoySnapshot) -> bool:
    """Check by the monotonic clock whether the Envoy ran on since the last reading of this process."""
    now = time.monotonic()
    key = snapshot.node, snapshot.service
    last_read_at, last_uptime_s = LAST_UPTIMES.get(key, (now, float("inf")))
    LAST_UPTIMES[key] = (now, snapshot.uptime_s)
    return snapshot.uptime_s + UPTIME_SLACK_S >= last_uptime_s + (now - last_read_at)


def sum_counts(
    report: Mapping[str, Any] | None, snapshot: EnvoySnapshot, *, is_same_life: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the counts of former lives, and the totals. `is_same_life`: the Envoy ran on, whatever the clocks show."""
    if report is None:
        return continue_counters({}, {}, snapshot.counts, is_same_life=True)
    previous = {name: value for name, value in report["last_reading"].items() if name not in NO_COUNTERS}
    # The uptime has whole seconds: a restart within one shows only in counters that fell.
    has_restarted = snapshot.uptime_s + 1 < report["age"]
    continues = (is_same_life or not has_restarted) and not was_reset(previous, snapshot.counts)
    return continue_counters(report["last_reading"].get("base", {}), previous, snapshot.counts, is_same_life=continues)


def continue_counters(
    base: CounterValues, previous: CounterValues, current: CounterValues, *, is_same_life: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the new base and the totals.

    `base` has the counts of former lives, and `previous` the last reading. In a new life, the last reading joins the base.
    """
    if not is_same_life:
        base = {name: base.get(name, 0) + previous.get(name, 0) for name in base.keys() | previous.keys()}
    return dict(base), {name: base.get(name, 0) + current.get(name, 0) for name in base.keys() | current.keys()}


def was_reset(previous: CounterValues, current: CounterValues) -> bool:
    """Check whether a counter is less than before: then this is a new life."""
    return any(current.get(name, 0) < value for name, value in previous.items())
