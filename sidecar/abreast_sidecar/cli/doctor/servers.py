"""Checks of Redis and Postgres: the servers, the join of captures to pairs, and the ledger."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
import redis

from abreast.protocol import join
from abreast.protocol.redis_client import connect_sync
from abreast_sidecar.cli.doctor import Check, CheckFactory, UnreachableError, mask_password
from abreast_sidecar.client.output import (
    format_bytes,
    format_count,
    format_quantity,
    format_seconds,
    format_share_of,
    to_printable,
)
from abreast_sidecar.redis_client import MAX_ENTRY_AGE_S, MAX_SERVICES, OLDEST_ENTRY_SCRIPT

REDIS_CHECKS = CheckFactory("Redis")
JOIN_CHECKS = CheckFactory("join")
POSTGRES_CHECKS = CheckFactory("Postgres")
REDIS_TIMEOUT_S = 3.0
MIN_REDIS_VERSION = (7, 0)
MAX_MEMORY_SHARE = 0.9  # a share of maxmemory
MAX_INCOMPLETE_PAIR_SHARE = 0.05
MAX_READY_PAIRS = 5000
MAX_OVERDUE_S = 30.0  # past the deadline of a pair
JOIN_COUNTERS = (join.RECEIVED, join.JOINED, join.TIMED_OUT, join.REJECTED_PAIRS, join.REJECTED_BYTES, "bytes")
STATS_KEY_PATTERN = re.compile(r"abreast:\{([^{}/]+)/(\d+)\}:stats")
MAX_SCAN_CALLS, SCAN_KEYS_PER_CALL = 20, 1000
SERVER_NAMES = {"redis_version": "Redis", "valkey_version": "Valkey"}

POSTGRES_TIMEOUT_S = 3
MIN_POSTGRES_VERSION_NUM = 150_000
SERVER_FACTS_QUERY = (
    "select current_setting('server_version_num')::int, current_setting('server_version'),"
    " extract(epoch from clock_timestamp())::float8, pg_database_size(current_database())::bigint,"
    " to_regclass('abreast.schema_version') is not null, to_regclass('abreast.migration') is not null"
)
LEDGER_FACTS_QUERY = (
    "select coalesce(max(version), 0)::int, (select count(*)::bigint from abreast.finding),"
    " (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count) from abreast.schema_version"
)

SERVICE_COUNTS_QUERY = (
    "select service, sum((totals->>'sampled')::bigint)::bigint,"
    " (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count c where c.service = r.service)"
    " from abreast.envoy_report r group by service order by service"
)
# Copies that old, or any version, answers with a status that the live response does not have. A baseline copy has the same
# code as the live request, so it shows that the service answers copies differently.
COPY_STATUS_QUERY = """
    with recent as (
        select endpoint_id, case live when 'old' then old_status else new_status end as live_status,
               case live when 'old' then new_status else old_status end as copy_status
        from abreast.pair
        where at > clock_timestamp() - interval '1 hour' and outcome <> 'match'
    )
    select service, status, sum(requests)::bigint
    from (
        select endpoint_id, copy_status as status, count(*) as requests
        from recent where live_status < 400 and copy_status in (429, 431) group by 1, 2
        union all
        select endpoint_id, right(path, 3)::int, baseline_count
        from abreast.finding
        where part = 'status' and baseline_count > 0 and path ~ '^[23][0-9]{2}->(400|401|403|431)$'
    ) as answered
    join abreast.endpoint e on e.id = answered.endpoint_id
    group by 1, 2 order by 1, 2
"""
COPY_STATUS_CAUSES = {
    429: ("a rate limit by client", "exempt requests with the header x-abreast-role: shadow or baseline from it"),
    431: ("a limit of headers", "raise it: Envoy adds up to 9 headers to a copy, see docs/transparency.md"),
    400: ("a limit of headers, or a token for one use", "raise the limit, or do not mirror these requests"),
    401: ("a session or cookie for one use", "do not mirror these requests, or compare them by a rule"),
    403: ("a session or cookie for one use", "do not mirror these requests, or compare them by a rule"),
}
SURPLUS_SHARE = 0.01  # a share of Envoy's count, as in a verdict
MIN_SURPLUS = 10


@dataclass(frozen=True)
class ShardState:
    """Counters of a shard since its keys exist. Waiting pairs lack a capture, ready ones wait for a worker.

    `overdue_s` is the time that the oldest waiting pair is past its deadline, and `ready_s` the time that the oldest
    ready pair waits for a worker.
    """

    counters: Mapping[str, int]
    waiting_pairs: int
    ready_pairs: int
    overdue_s: float = 0.0
    ready_s: float = 0.0


@dataclass(frozen=True)
class RedisFacts:
    """State of Redis, with shards and reports by service. A positive `clock_offset_s` is ahead of this machine.

    Unregistered services have captures in Redis, but no entry in abreast:services.
    """

    url: str
    info: Mapping[str, Any]
    server_time_s: float
    clock_offset_s: float
    eviction_policy: str | None  # None if the server refuses CONFIG
    shards: Mapping[str, list[ShardState]] = field(default_factory=dict)
    reports: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    unregistered_shards: Mapping[str, int] = field(default_factory=dict)

    def total_counter(self, service: str, counter: str) -> int:
        return sum(shard.counters.get(counter, 0) for shard in self.shards.get(service, []))


def read_redis_facts(url: str, expected_services: Iterable[str] = ()) -> RedisFacts:
    """Read the state of Redis. Raise UnreachableError. `expected_services` should have captures there."""
    try:
        with connect_sync(url, timeout=REDIS_TIMEOUT_S) as client:
            return _gather_redis_facts(client, mask_password(url), expected_services)
    except (redis.RedisError, redis.exceptions.RedisClusterException, ValueError, OSError) as error:
        raise UnreachableError(str(error).lower() or type(error).__name__) from error


def _gather_redis_facts(client: Any, url: str, expected_services: Iterable[str]) -> RedisFacts:
    servers = [client]
    if isinstance(client, redis.RedisCluster):  # its primaries by used memory, largest first
        servers = [client.get_redis_connection(node) for node in client.get_primaries()]  # type: ignore[no-untyped-call]  # of redis-py
        servers.sort(key=lambda server: -int(server.info("memory")["used_memory"]))
    servers[0].ping()  # so that the time to connect does not add to the clock offset
    full_seconds, microseconds = servers[0].time()
    server_time_s = full_seconds + microseconds / 1e6
    clock_offset_s = server_time_s - time.time()
    registered_shards = {name: int(shards) for name, shards in client.hgetall(join.SERVICES_KEY).items()}
    unregistered_shards = _find_unregistered_shards(client, servers, registered_shards, expected_services)
    services = {**unregistered_shards, **registered_shards}
    eviction_policy = None
    with contextlib.suppress(redis.RedisError):  # managed servers refuse CONFIG
        eviction_policy = str(servers[0].config_get("maxmemory-policy").get("maxmemory-policy", "")) or None
    return RedisFacts(
        url=url,
        info=servers[0].info(),
        server_time_s=server_time_s,
        clock_offset_s=clock_offset_s,
        eviction_policy=eviction_policy,
        shards={
            name: [_read_shard(client, join.Keys(name, n), server_time_s) for n in range(shards)]
            for name, shards in services.items()
        },
        reports={name: [parse_report(text) for text in client.hvals(join.reports_key(name))] for name in services},
        unregistered_shards=unregistered_shards,
    )


def _find_unregistered_shards(
    client: Any, servers: Iterable[Any], registered_shards: Mapping[str, int], expected_services: Iterable[str]
) -> dict[str, int]:
    """Count the shards of services that no sidecar reads. Scan for other names only if no service is registered."""
    keys = [f"abreast:{{{name}/0}}:stats" for name in expected_services]
    keys = [key for key in keys if client.exists(key)]
    for server in () if registered_shards else servers:
        keys += _scan_stats_keys(server)
    shard_counts: dict[str, int] = {}
    for name, shard in (match.groups() for match in map(STATS_KEY_PATTERN.fullmatch, keys) if match):
        if name not in registered_shards:
            shard_counts[name] = max(shard_counts.get(name, 0), int(shard) + 1)
    return shard_counts


def _scan_stats_keys(server: Any) -> list[str]:
    keys, cursor = [], 0
    for _ in range(MAX_SCAN_CALLS):
        cursor, batch = server.scan(cursor, match="abreast:{*}:stats", count=SCAN_KEYS_PER_CALL)
        keys += batch
        if not cursor:
            break
    return keys


def _read_shard(client: Any, keys: join.Keys, server_time_s: float) -> ShardState:
    counters = {name: int(value) for name, value in client.hgetall(keys.stats).items() if value.lstrip("-").isdigit()}
    oldest = client.zrange(keys.due, 0, 0, withscores=True)
    overdue_s = max(0.0, server_time_s - oldest[0][1] / 1000) if oldest else 0.0
    ready_s = client.eval(OLDEST_ENTRY_SCRIPT.text, 1, keys.ready) / 1000
    return ShardState(counters, client.zcard(keys.due), client.xlen(keys.ready), overdue_s, ready_s)


def parse_report(text: str) -> dict[str, Any]:
    try:
        report = json.loads(text)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def check_redis(facts: RedisFacts) -> Iterator[Check]:
    kind = "valkey_version" if "valkey_version" in facts.info else "redis_version"
    observation = f"{SERVER_NAMES[kind]} {facts.info.get(kind, '?')} at {facts.url}"
    numbers = str(facts.info.get("redis_version", "")).split(".")
    is_outdated = tuple(int(n) for n in numbers[:2] if n.isdigit()) < MIN_REDIS_VERSION
    yield REDIS_CHECKS.make("version", observation, "Abreast needs Redis 7.0 or newer, or Valkey", fails=is_outdated)
    yield _check_eviction(facts.eviction_policy)
    if len(facts.shards) > MAX_SERVICES:
        observation = f"{len(facts.shards)} services are registered, and sidecars read at most {MAX_SERVICES}"
        advice = "give services Redis users with few rights, since each process that can write to Redis adds names"
        yield REDIS_CHECKS.make("services", observation, advice, fails=True)
    used_bytes, limit_bytes = int(facts.info.get("used_memory", 0)), int(facts.info.get("maxmemory", 0))
    limit_text = f"of {format_bytes(limit_bytes)} used" if limit_bytes else "used, no limit set"
    is_full = bool(limit_bytes) and used_bytes >= limit_bytes * MAX_MEMORY_SHARE
    advice = "add memory, or lower the sampling: a full Redis refuses captures"
    yield REDIS_CHECKS.make("memory", f"{format_bytes(used_bytes)} {limit_text}", advice, fails=is_full)
    failing_fields = [
        name for name in ("rdb_last_bgsave_status", "aof_last_write_status") if facts.info.get(name, "ok") != "ok"
    ]
    if failing_fields:
        observation = f"saving to disk fails ({', '.join(failing_fields)})"
    elif facts.info.get("aof_enabled"):
        observation = "append-only file"
    else:
        observation = "no append-only file: a crash loses pairs"
    advice = "see its log, and check for a full disk: Redis refuses writes until it can save"
    yield REDIS_CHECKS.make("persistence", observation, advice, fails=bool(failing_fields))


def _check_eviction(policy: str | None) -> Check:
    if policy is None:
        observation, advice = "the server does not show its maxmemory-policy", "make sure that it is noeviction"
    else:
        risk_text = "" if policy == "noeviction" else ": Redis may evict captures, and nothing counts them"
        observation = f"maxmemory-policy is {policy}{risk_text}"
        advice = "set maxmemory-policy noeviction, or use a dedicated Redis for Abreast"
    return REDIS_CHECKS.make("eviction", observation, advice, warns=policy != "noeviction")


def check_registration(facts: RedisFacts, service: str) -> Iterator[Check]:
    if service in facts.unregistered_shards:
        yield REDIS_CHECKS.make(
            "registration",
            f"registration missing: captures of {service} are in Redis, but no sidecar reads them, "
            f"because {join.SERVICES_KEY} does not list the service",
            "start the service, which registers itself every few seconds, or see its log; keys may have been deleted",
            fails=True,
        )


def check_join(
    facts: RedisFacts, service: str, mirrored_requests: int | None, captures_off: Collection[str] = ()
) -> Iterator[Check]:
    """Check the join. `mirrored_requests` is Envoy's count, or None if it is unknown.

    `captures_off` are the versions that nothing captures, so that no pair is complete.
    """
    captures, joined, incomplete, rejected_pairs, rejected_bytes, size_bytes = (
        facts.total_counter(service, counter) for counter in JOIN_COUNTERS
    )
    if not captures:
        observation = f"no capture of {service} has ever arrived"
        advice = "see the checks of the services"
        fails = mirrored_requests != 0 and len(captures_off) < 2  # versions
        yield JOIN_CHECKS.make("captures", observation, advice, fails=fails, warns=True)
        return
    yield JOIN_CHECKS.make("captures", f"{format_quantity(captures, 'capture')} arrived")

    share = format_share_of(incomplete, joined + incomplete) or "0%"
    yield JOIN_CHECKS.make(
        "pairs",
        f"{format_quantity(joined, 'pair')} joined, {format_count(incomplete)} with a missing capture ({share})",
        "captures of one version are missing, or arrive after the middleware's pair_timeout",
        fails=not joined and incomplete > 0 and not captures_off,
        warns=incomplete > (joined + incomplete) * MAX_INCOMPLETE_PAIR_SHARE,
    )
    if rejected := rejected_pairs + rejected_bytes:
        observation = f"{format_quantity(rejected, 'capture')} refused so far, because Redis was at its limit"
        advice = "check that the sidecar's worker runs and is fast enough, or lower the sampling"
        yield JOIN_CHECKS.make("refused", observation, advice, warns=True)

    shards = facts.shards.get(service, [])
    waiting, ready = sum(shard.waiting_pairs for shard in shards), sum(shard.ready_pairs for shard in shards)
    size = format_bytes(max(0, size_bytes))
    observation = f"{format_quantity(waiting, 'pair')} wait for a copy, {format_count(ready)} for a worker ({size})"
    ready_s = max((shard.ready_s for shard in shards), default=0.0)
    if is_stuck := ready_s > MAX_ENTRY_AGE_S:
        observation += f", the oldest for {format_seconds(ready_s)}"
    advice = "check that the sidecar's worker runs and is fast enough (ABREAST_WORKERS), and see its log"
    yield JOIN_CHECKS.make("queues", observation, advice, fails=is_stuck, warns=ready >= MAX_READY_PAIRS)
    overdue_s = max((shard.overdue_s for shard in shards), default=0.0)
    if overdue_s > MAX_OVERDUE_S:
        observation = f"a pair still waits for a copy {format_seconds(overdue_s)} after its deadline"
        advice = "check that the sidecar runs and uses this Redis, and see its log (worker)"
        yield JOIN_CHECKS.make("sweep", observation, advice, fails=True)


@dataclass(frozen=True)
class PostgresFacts:
    """`schema_version` is 0 before `abreast migrate`. A positive `clock_offset_s` is ahead of this machine."""

    url: str
    version_num: int
    version: str
    clock_offset_s: float
    database_bytes: int
    schema_version: int = 0
    findings: int = 0
    pairs: int = 0
    outdated: bool = False  # holds a ledger that this code can't upgrade
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # service → sampled by Envoy, pairs
    copy_statuses: Mapping[tuple[str, int], int] = field(
        default_factory=dict
    )  # (service, status) → copies, unlike live


def read_postgres_facts(url: str) -> PostgresFacts:
    try:
        with psycopg.connect(url, connect_timeout=POSTGRES_TIMEOUT_S, prepare_threshold=None) as connection:
            # a connection pooler would refuse this as an option of the connection
            connection.execute(f"set local statement_timeout = '{POSTGRES_TIMEOUT_S}s'".encode())
            row = connection.execute(SERVER_FACTS_QUERY).fetchone()
            version_num, version, server_time_s, database_bytes, has_schema, is_outdated = row or (0, "", 0, 0, 0, 0)
            clock_offset_s = server_time_s - time.time()
            ledger_row = connection.execute(LEDGER_FACTS_QUERY).fetchone() if has_schema else None
            count_rows = connection.execute(SERVICE_COUNTS_QUERY).fetchall() if has_schema else []
            status_rows = connection.execute(COPY_STATUS_QUERY).fetchall() if has_schema else []
    except psycopg.Error as error:
        raise UnreachableError(" ".join(str(error).split()).lower() or type(error).__name__) from error
    ledger: tuple[int, int, int] = ledger_row or (0, 0, 0)
    return PostgresFacts(
        mask_password(url),
        version_num,
        version,
        clock_offset_s,
        database_bytes,
        *ledger,
        outdated=is_outdated,
        counts={service: (sampled, pairs) for service, sampled, pairs in count_rows if sampled is not None},
        copy_statuses={(service, status): copies for service, status, copies in status_rows},
    )


def check_postgres(facts: PostgresFacts, expected_version: int) -> Iterator[Check]:
    """Check against `expected_version`, the newest schema version of this code."""
    observation = f"Postgres {facts.version.split()[0]} at {facts.url}, {format_bytes(facts.database_bytes)}"
    is_too_old = facts.version_num < MIN_POSTGRES_VERSION_NUM
    yield POSTGRES_CHECKS.make("version", observation, "Abreast needs Postgres 15 or newer", fails=is_too_old)
    advice = ""
    if facts.outdated:
        observation = "contains a ledger that this Abreast can't upgrade"
        advice = "create a new database and set it in ABREAST_POSTGRES_URL"
    elif facts.schema_version < expected_version:
        version_text = f"at version {facts.schema_version} of {expected_version}"
        observation = version_text if facts.schema_version else "no schema yet"
        advice = "start the sidecar, or run: abreast migrate"
    elif facts.schema_version > expected_version:
        observation = f"at version {facts.schema_version}, newer than this code's {expected_version}"
        advice = "use the newer release of Abreast that created it"
    else:
        observation = f"at version {facts.schema_version}, up to date"
    yield POSTGRES_CHECKS.make("schema", observation, advice, fails=bool(advice))
    if facts.schema_version:
        totals = f"{format_quantity(facts.pairs, 'pair')} and {format_quantity(facts.findings, 'finding')}"
        yield POSTGRES_CHECKS.make("ledger", totals)
    for service, (sampled, pairs) in facts.counts.items():
        if pairs - sampled > max(MIN_SURPLUS, SURPLUS_SHARE * sampled):
            observation = (
                f"the ledger has {format_quantity(pairs, 'pair')} of {to_printable(service)}, but Envoy sampled"
                f" {format_quantity(sampled, 'request')}: captures came past Envoy"
            )
            advice = (
                "check who can write to Redis and reach the versions, and that ABREAST_ENVOY_ADMIN lists all Envoys"
            )
            yield POSTGRES_CHECKS.make("surplus", observation, advice, fails=True)
    for (service, status), copies in facts.copy_statuses.items():
        cause, advice = COPY_STATUS_CAUSES[status]
        observation = (
            f"{to_printable(service)} answers copies differently: {format_quantity(copies, 'copy', 'copies')} got"
            f" {status}, and their live requests did not; the cause may be {cause}"
        )
        yield POSTGRES_CHECKS.make("copies", observation, advice, warns=True)
