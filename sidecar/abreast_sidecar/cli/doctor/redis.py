"""Checks of Redis: the server, the captures that arrive there, and their join to pairs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from abreast.protocol import join
from abreast.protocol.redis_client import connect_sync
from abreast_sidecar.cli.doctor import Check, CheckFactory, UnreachableError, mask_password
from abreast_sidecar.client.output import format_bytes, format_count, format_quantity, format_seconds, format_share_of

REDIS_CHECKS = CheckFactory("Redis")
JOIN_CHECKS = CheckFactory("join")
REDIS_TIMEOUT_S = 3.0
MIN_REDIS_VERSION = (7, 0)
MAX_MEMORY_SHARE = 0.9  # a share of maxmemory
MAX_INCOMPLETE_PAIR_SHARE = 0.05
MAX_READY_PAIRS = 5000
MAX_OVERDUE_S = 30.0  # past the deadline of a pair
STATS_KEY_PATTERN = re.compile(r"abreast:\{([^{}/]+)/(\d+)\}:stats")
MAX_SCAN_CALLS, SCAN_KEYS_PER_CALL = 20, 1000
SERVER_NAMES = {"redis_version": "Redis", "valkey_version": "Valkey"}


@dataclass(frozen=True)
class ShardState:
    """Counters of a shard since its keys exist. Waiting pairs lack a capture, ready ones wait for a worker.

    `overdue_s` is the time that the oldest waiting pair is past its deadline.
    """

    counters: Mapping[str, int]
    waiting_pairs: int
    ready_pairs: int
    overdue_s: float = 0.0


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


def _list_servers(client: Any) -> list[Any]:
    """Return the server, or the primaries of a cluster by used memory, largest first."""
    if not isinstance(client, redis.RedisCluster):
        return [client]
    primaries = [client.get_redis_connection(node) for node in client.get_primaries()]  # type: ignore[no-untyped-call]  # of redis-py
    return sorted(primaries, key=lambda server: -int(server.info("memory")["used_memory"]))


def _gather_redis_facts(client: Any, url: str, expected_services: Iterable[str]) -> RedisFacts:
    servers = _list_servers(client)
    servers[0].ping()  # so that the time to connect does not add to the clock offset
    full_seconds, microseconds = servers[0].time()
    server_time_s = full_seconds + microseconds / 1e6
    clock_offset_s = server_time_s - time.time()
    registered_shards = {name: int(shards) for name, shards in client.hgetall(join.SERVICES_KEY).items()}
    unregistered_shards = _find_unregistered_shards(client, servers, registered_shards, expected_services)
    services = {**unregistered_shards, **registered_shards}
    return RedisFacts(
        url=url,
        info=servers[0].info(),
        server_time_s=server_time_s,
        clock_offset_s=clock_offset_s,
        eviction_policy=_read_eviction_policy(servers[0]),
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


def _read_eviction_policy(client: Any) -> str | None:
    try:
        return str(client.config_get("maxmemory-policy").get("maxmemory-policy", "")) or None
    except redis.RedisError:  # as managed servers do
        return None


def _read_shard(client: Any, keys: join.Keys, server_time_s: float) -> ShardState:
    counters = {name: int(value) for name, value in client.hgetall(keys.stats).items() if value.lstrip("-").isdigit()}
    oldest = client.zrange(keys.due, 0, 0, withscores=True)
    overdue_s = max(0.0, server_time_s - oldest[0][1] / 1000) if oldest else 0.0
    return ShardState(counters, client.zcard(keys.due), client.xlen(keys.ready), overdue_s)


def parse_report(text: str) -> dict[str, Any]:
    try:
        report = json.loads(text)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def check_redis(facts: RedisFacts) -> Iterator[Check]:
    yield _check_redis_version(facts)
    yield _check_eviction(facts)
    yield _check_memory(facts)
    yield _check_persistence(facts)


def _check_redis_version(facts: RedisFacts) -> Check:
    kind = "valkey_version" if "valkey_version" in facts.info else "redis_version"
    version = str(facts.info.get(kind, "?"))
    observation = f"{SERVER_NAMES[kind]} {version} at {facts.url}"
    numbers = str(facts.info.get("redis_version", "")).split(".")
    if tuple(int(n) for n in numbers[:2] if n.isdigit()) < MIN_REDIS_VERSION:
        return REDIS_CHECKS.fail("version", observation, "Abreast needs Redis 7.0 or newer, or Valkey")
    return REDIS_CHECKS.ok("version", observation)


def _check_eviction(facts: RedisFacts) -> Check:
    if facts.eviction_policy is None:
        return REDIS_CHECKS.warn(
            "eviction", "the server does not show its maxmemory-policy", "make sure that it is noeviction"
        )
    if facts.eviction_policy == "noeviction":
        return REDIS_CHECKS.ok("eviction", "maxmemory-policy is noeviction")
    observation = f"maxmemory-policy is {facts.eviction_policy}: Redis may evict captures, and nothing counts them"
    return REDIS_CHECKS.warn(
        "eviction", observation, "set maxmemory-policy noeviction, or use a dedicated Redis for Abreast"
    )


def _check_memory(facts: RedisFacts) -> Check:
    used_bytes, limit_bytes = int(facts.info.get("used_memory", 0)), int(facts.info.get("maxmemory", 0))
    if not limit_bytes:
        return REDIS_CHECKS.ok("memory", f"{format_bytes(used_bytes)} used, no limit set")
    observation = f"{format_bytes(used_bytes)} of {format_bytes(limit_bytes)} used"
    if used_bytes < limit_bytes * MAX_MEMORY_SHARE:
        return REDIS_CHECKS.ok("memory", observation)
    return REDIS_CHECKS.fail("memory", observation, "add memory, or lower the sampling: a full Redis refuses captures")


def _check_persistence(facts: RedisFacts) -> Check:
    failing_fields = [
        name for name in ("rdb_last_bgsave_status", "aof_last_write_status") if facts.info.get(name, "ok") != "ok"
    ]
    if failing_fields:
        advice = "see its log, and check for a full disk: Redis refuses writes until it can save"
        return REDIS_CHECKS.fail("persistence", f"saving to disk fails ({', '.join(failing_fields)})", advice)
    has_log = facts.info.get("aof_enabled")
    return REDIS_CHECKS.ok("persistence", "append-only file" if has_log else "no append-only file: a crash loses pairs")


def check_registration(facts: RedisFacts, service: str) -> Iterator[Check]:
    if service in facts.unregistered_shards:
        yield REDIS_CHECKS.fail(
            "registration",
            f"registration missing: captures of {service} are in Redis, but no sidecar reads them, "
            f"because {join.SERVICES_KEY} does not list the service",
            "start the service, which registers itself every few seconds, or see its log; keys may have been deleted",
        )


def check_join(facts: RedisFacts, service: str, mirrored_requests: int | None) -> Iterator[Check]:
    """Check the join. `mirrored_requests` is Envoy's count, or None if it is unknown."""
    captures, joined_pairs, incomplete_pairs = (
        facts.total_counter(service, counter) for counter in (join.RECEIVED, join.JOINED, join.TIMED_OUT)
    )
    if not captures:
        make_check = JOIN_CHECKS.warn if mirrored_requests == 0 else JOIN_CHECKS.fail
        yield make_check("captures", f"no capture of {service} has ever arrived", "see the checks of the services")
        return
    yield JOIN_CHECKS.ok("captures", f"{format_quantity(captures, 'capture')} arrived")
    yield _check_joined_pairs(joined_pairs, incomplete_pairs)
    yield from _check_rejected_captures(facts, service)
    yield _check_queue_depth(facts, service)
    yield from _check_overdue_pairs(facts, service)


def _check_joined_pairs(joined_pairs: int, incomplete_pairs: int) -> Check:
    total = joined_pairs + incomplete_pairs
    share = format_share_of(incomplete_pairs, total) or "0%"
    observation = (
        f"{format_quantity(joined_pairs, 'pair')} joined, "
        f"{format_count(incomplete_pairs)} with a missing capture ({share})"
    )
    if incomplete_pairs <= total * MAX_INCOMPLETE_PAIR_SHARE:
        return JOIN_CHECKS.ok("pairs", observation)
    make_check = JOIN_CHECKS.warn if joined_pairs else JOIN_CHECKS.fail
    advice = "captures of one version are missing, or arrive after the middleware's pair_timeout"
    return make_check("pairs", observation, advice)


def _check_rejected_captures(facts: RedisFacts, service: str) -> Iterator[Check]:
    rejected = sum(facts.total_counter(service, counter) for counter in (join.REJECTED_PAIRS, join.REJECTED_BYTES))
    if rejected:
        observation = f"{format_quantity(rejected, 'capture')} refused so far, because Redis was at its limit"
        advice = "check that the sidecar's worker runs and is fast enough, or lower the sampling"
        yield JOIN_CHECKS.warn("refused", observation, advice)


def _check_queue_depth(facts: RedisFacts, service: str) -> Check:
    shards = facts.shards.get(service, [])
    waiting_pairs, ready_pairs = (
        sum(shard.waiting_pairs for shard in shards),
        sum(shard.ready_pairs for shard in shards),
    )
    size = format_bytes(max(0, facts.total_counter(service, "bytes")))
    observation = (
        f"{format_quantity(waiting_pairs, 'pair')} wait for a copy, {format_count(ready_pairs)} for a worker ({size})"
    )
    if ready_pairs < MAX_READY_PAIRS:
        return JOIN_CHECKS.ok("queues", observation)
    advice = "check that the sidecar's worker runs and is fast enough (ABREAST_WORKERS)"
    return JOIN_CHECKS.warn("queues", observation, advice)


def _check_overdue_pairs(facts: RedisFacts, service: str) -> Iterator[Check]:
    overdue_s = max((shard.overdue_s for shard in facts.shards.get(service, [])), default=0.0)
    if overdue_s > MAX_OVERDUE_S:
        observation = f"a pair still waits for a copy {format_seconds(overdue_s)} after its deadline"
        advice = "check that the sidecar runs and uses this Redis, and see its log (worker)"
        yield JOIN_CHECKS.fail("sweep", observation, advice)
