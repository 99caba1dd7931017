"""Is Redis fit, do captures arrive there, and do they join?"""

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
from abreast_sidecar.cli.doctor.check import Check, CheckFactory, UnreachableError, mask_password
from abreast_sidecar.client.output import format_bytes, format_count, format_quantity, format_seconds, format_share_of

REDIS_CHECKS = CheckFactory("Redis")
JOIN_CHECKS = CheckFactory("join")
REDIS_TIMEOUT_S = 3.0  # seconds
MIN_REDIS_VERSION = (7, 0)
MAX_MEMORY_SHARE = 0.9  # share of the memory that is allowed
MAX_INCOMPLETE_PAIR_SHARE = 0.05  # share of pairs with a missing capture that is worth a word
MAX_READY_PAIRS = 5000  # pairs that wait for a worker
MAX_OVERDUE_S = 30.0  # seconds past its deadline that no pair should wait
STATS_KEY_PATTERN = re.compile(r"abreast:\{([^{}/]+)/(\d+)\}:stats")
MAX_SCAN_CALLS, SCAN_KEYS_PER_CALL = 20, 1000  # calls, and keys a call, that are looked through for services
SERVER_NAMES = {"redis_version": "Redis", "valkey_version": "Valkey"}


@dataclass(frozen=True)
class ShardState:
    """Counters since the keys were made; `waiting` pairs lack a copy, `ready` ones wait for a worker.

    `overdue` is how many seconds the oldest waiting pair is past its deadline.
    """

    counters: Mapping[str, int]
    waiting_pairs: int
    ready_pairs: int
    overdue_s: float = 0.0


@dataclass(frozen=True)
class RedisFacts:
    """`now` is Redis's clock in seconds, `ahead` of this machine's; `shards` and `reports` by service.

    `unregistered` services have captures here and no entry in abreast:services.
    """

    url: str
    info: Mapping[str, Any]
    server_time_s: float
    clock_offset_s: float
    eviction_policy: str | None  # None where the server doesn't tell
    shards: Mapping[str, list[ShardState]] = field(default_factory=dict)
    reports: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    unregistered_shards: Mapping[str, int] = field(default_factory=dict)

    def total_counter(self, service: str, counter: str) -> int:
        return sum(shard.counters.get(counter, 0) for shard in self.shards.get(service, []))


def read_redis_facts(url: str, expected_services: Iterable[str] = ()) -> RedisFacts:
    """`hints` are names of services that should be there."""
    try:
        with connect_sync(url, timeout=REDIS_TIMEOUT_S) as client:
            return _gather_redis_facts(client, mask_password(url), expected_services)
    except (redis.RedisError, redis.exceptions.RedisClusterException, ValueError, OSError) as error:
        raise UnreachableError(str(error).lower() or type(error).__name__) from error


def _list_servers(client: Any) -> list[Any]:
    """The one server, or a cluster's primaries, the fullest first."""
    if not isinstance(client, redis.RedisCluster):
        return [client]
    primaries = [client.get_redis_connection(node) for node in client.get_primaries()]  # type: ignore[no-untyped-call]  # redis-py's
    return sorted(primaries, key=lambda one: -int(one.info("memory")["used_memory"]))


def _gather_redis_facts(client: Any, url: str, expected_services: Iterable[str]) -> RedisFacts:
    servers = _list_servers(client)
    servers[0].ping()  # connecting takes its time, and must not count
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
    """Shards, by service, of captures that no sidecar looks for; nameless ones only where nothing is registered."""
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
    except redis.RedisError:  # managed servers refuse CONFIG
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
            "eviction", "the server does not tell its maxmemory-policy", "make sure it is noeviction"
        )
    if facts.eviction_policy == "noeviction":
        return REDIS_CHECKS.ok("eviction", "maxmemory-policy is noeviction")
    observation = f"maxmemory-policy is {facts.eviction_policy}: when memory is short, captures vanish uncounted"
    return REDIS_CHECKS.warn(
        "eviction", observation, "set maxmemory-policy noeviction, or give Abreast a Redis of its own"
    )


def _check_memory(facts: RedisFacts) -> Check:
    used_bytes, limit_bytes = int(facts.info.get("used_memory", 0)), int(facts.info.get("maxmemory", 0))
    if not limit_bytes:
        return REDIS_CHECKS.ok("memory", f"{format_bytes(used_bytes)} used, no limit set")
    observation = f"{format_bytes(used_bytes)} of {format_bytes(limit_bytes)} used"
    if used_bytes < limit_bytes * MAX_MEMORY_SHARE:
        return REDIS_CHECKS.ok("memory", observation)
    return REDIS_CHECKS.fail(
        "memory", observation, "give it more memory, or lower the sampling: Redis refuses captures when it is full"
    )


def _check_persistence(facts: RedisFacts) -> Check:
    failing_fields = [
        name for name in ("rdb_last_bgsave_status", "aof_last_write_status") if facts.info.get(name, "ok") != "ok"
    ]
    if failing_fields:
        advice = "look into its log: is the disk full? Redis refuses writes then"
        return REDIS_CHECKS.fail("persistence", f"saving to disk fails ({', '.join(failing_fields)})", advice)
    persistence_mode = (
        "append-only file" if facts.info.get("aof_enabled") else "no append-only file: a crash loses what waits there"
    )
    return REDIS_CHECKS.ok("persistence", persistence_mode)


def check_registration(facts: RedisFacts, service: str) -> Iterator[Check]:
    if service in facts.unregistered_shards:
        yield REDIS_CHECKS.fail(
            "registration",
            f"registration missing: captures of {service} lie here, but {join.SERVICES_KEY} does not name it, so no sidecar reads them",
            "a running service registers itself every few seconds: start it, or see its log; was a part of Redis deleted?",
        )


def check_join(facts: RedisFacts, service: str, mirrored_requests: int | None) -> Iterator[Check]:
    """`mirrored`: requests that Envoy says it mirrored, None for unknown."""
    joined_pairs, incomplete_pairs = (
        facts.total_counter(service, join.JOINED),
        facts.total_counter(service, join.TIMED_OUT),
    )
    if not facts.total_counter(service, join.RECEIVED):
        make_check = JOIN_CHECKS.warn if mirrored_requests == 0 else JOIN_CHECKS.fail
        yield make_check(
            "captures", f"no capture of {service} has ever arrived", "see what is said of the services above"
        )
        return
    yield JOIN_CHECKS.ok(
        "captures", f"{format_quantity(facts.total_counter(service, join.RECEIVED), 'capture')} arrived"
    )
    yield _check_joined_pairs(joined_pairs, incomplete_pairs)
    yield from _check_rejected_captures(facts, service)
    yield _check_queue_depth(facts, service)
    yield from _check_overdue_pairs(facts, service)


def _check_joined_pairs(joined_pairs: int, incomplete_pairs: int) -> Check:
    observation = f"{format_quantity(joined_pairs, 'pair')} joined, {format_count(incomplete_pairs)} with a missing capture ({format_share_of(incomplete_pairs, joined_pairs + incomplete_pairs) or '0%'})"
    if incomplete_pairs <= (joined_pairs + incomplete_pairs) * MAX_INCOMPLETE_PAIR_SHARE:
        return JOIN_CHECKS.ok("pairs", observation)
    advice = "one version's captures are missing, or come later than the middleware's pair_timeout"
    return (
        JOIN_CHECKS.warn("pairs", observation, advice)
        if joined_pairs
        else JOIN_CHECKS.fail("pairs", observation, advice)
    )


def _check_rejected_captures(facts: RedisFacts, service: str) -> Iterator[Check]:
    rejected_captures = facts.total_counter(service, join.REJECTED_PAIRS) + facts.total_counter(
        service, join.REJECTED_BYTES
    )
    if rejected_captures:
        observation = (
            f"{format_quantity(rejected_captures, 'capture')} refused so far, since as much waited as may wait"
        )
        yield JOIN_CHECKS.warn(
            "refused", observation, "is the sidecar's worker running and fast enough? or lower the sampling"
        )


def _check_queue_depth(facts: RedisFacts, service: str) -> Check:
    shards = facts.shards.get(service, [])
    waiting_pairs, ready_pairs = (
        sum(shard.waiting_pairs for shard in shards),
        sum(shard.ready_pairs for shard in shards),
    )
    observation = f"{format_quantity(waiting_pairs, 'pair')} wait for a copy, {format_count(ready_pairs)} for a worker ({format_bytes(max(0, facts.total_counter(service, 'bytes')))})"
    if ready_pairs < MAX_READY_PAIRS:
        return JOIN_CHECKS.ok("queues", observation)
    return JOIN_CHECKS.warn("queues", observation, "is the sidecar's worker running and fast enough? (ABREAST_WORKERS)")


def _check_overdue_pairs(facts: RedisFacts, service: str) -> Iterator[Check]:
    overdue_s = max((shard.overdue_s for shard in facts.shards.get(service, [])), default=0.0)
    if overdue_s > MAX_OVERDUE_S:
        observation = f"a pair waits for a copy since {format_seconds(overdue_s)} past its deadline: nothing sweeps"
        yield JOIN_CHECKS.fail(
            "sweep", observation, "is the sidecar running, and does it use this Redis? see its log (worker)"
        )
