"""Is Redis fit, do captures arrive there, and do they join?"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from abreast import join
from abreast.redis_url import blocking
from abreast_sidecar.cli.checks.check import Check, Part, UnreachableError, without_password
from abreast_sidecar.cli.humane import count, counted, part_of, seconds, size

REDIS = Part("Redis")
JOIN = Part("join")
TIMEOUT = 3.0  # seconds
OLDEST = (7, 0)
FULL = 0.9  # share of the memory that is allowed
LONELY = 0.05  # share of pairs with a missing capture that is worth a word
MANY = 5000  # pairs that wait for a worker
STUCK = 30.0  # seconds past its deadline that no pair should wait
STATS = re.compile(r"abreast:\{([^{}/]+)/(\d+)\}:stats")
SCANS, SCANNED = 20, 1000  # calls, and keys a call, that are looked through for services
KINDS = {"redis_version": "Redis", "valkey_version": "Valkey"}


@dataclass(frozen=True)
class Shard:
    """Counters since the keys were made; `waiting` pairs lack a copy, `ready` ones wait for a worker.

    `overdue` is how many seconds the oldest waiting pair is past its deadline.
    """

    stats: Mapping[str, int]
    waiting: int
    ready: int
    overdue: float = 0.0


@dataclass(frozen=True)
class RedisFacts:
    """`now` is Redis's clock in seconds, `ahead` of this machine's; `shards` and `reports` by service.

    `unregistered` services have captures here and no entry in abreast:services.
    """

    url: str
    info: Mapping[str, Any]
    now: float
    ahead: float
    policy: str | None  # None where the server doesn't tell
    shards: Mapping[str, list[Shard]] = field(default_factory=dict)
    reports: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    unregistered: Mapping[str, int] = field(default_factory=dict)

    def total(self, service: str, name: str) -> int:
        return sum(shard.stats.get(name, 0) for shard in self.shards.get(service, []))


def look(url: str, hints: Iterable[str] = ()) -> RedisFacts:
    """`hints` are names of services that should be there."""
    try:
        with blocking(url, timeout=TIMEOUT) as client:
            return _read(client, without_password(url), hints)
    except (redis.RedisError, redis.exceptions.RedisClusterException, ValueError, OSError) as error:
        raise UnreachableError(str(error).lower() or type(error).__name__) from error


def _servers(client: Any) -> list[Any]:
    """The one server, or a cluster's primaries, the fullest first."""
    if not isinstance(client, redis.RedisCluster):
        return [client]
    found = [client.get_redis_connection(node) for node in client.get_primaries()]  # type: ignore[no-untyped-call]  # redis-py's
    return sorted(found, key=lambda one: -int(one.info("memory")["used_memory"]))


def _read(client: Any, url: str, hints: Iterable[str]) -> RedisFacts:
    servers = _servers(client)
    servers[0].ping()  # connecting takes its time, and must not count
    whole, micros = servers[0].time()
    now = whole + micros / 1e6
    ahead = now - time.time()
    registered = {name: int(shards) for name, shards in client.hgetall(join.SERVICES).items()}
    unregistered = _unregistered(client, servers, registered, hints)
    services = {**unregistered, **registered}
    return RedisFacts(
        url=url,
        info=servers[0].info(),
        now=now,
        ahead=ahead,
        policy=_policy(servers[0]),
        shards={
            name: [_shard(client, join.Keys(name, n), now) for n in range(shards)]
            for name, shards in services.items()
        },
        reports={
            name: [parse_report(text) for text in client.hvals(join.reports(name))] for name in services
        },
        unregistered=unregistered,
    )


def _unregistered(
    client: Any, servers: Iterable[Any], registered: Mapping[str, int], hints: Iterable[str]
) -> dict[str, int]:
    """Shards, by service, of captures that no sidecar looks for; nameless ones only where nothing is registered."""
    keys = [f"abreast:{{{name}/0}}:stats" for name in hints]
    keys = [key for key in keys if client.exists(key)]
    for server in () if registered else servers:
        keys += _scanned(server)
    found: dict[str, int] = {}
    for name, shard in (match.groups() for match in map(STATS.fullmatch, keys) if match):
        if name not in registered:
            found[name] = max(found.get(name, 0), int(shard) + 1)
    return found


def _scanned(server: Any) -> list[str]:
    keys, cursor = [], 0
    for _ in range(SCANS):
        cursor, some = server.scan(cursor, match="abreast:{*}:stats", count=SCANNED)
        keys += some
        if not cursor:
            break
    return keys


def _policy(client: Any) -> str | None:
    try:
        return str(client.config_get("maxmemory-policy").get("maxmemory-policy", "")) or None
    except redis.RedisError:  # managed servers refuse CONFIG
        return None


def _shard(client: Any, keys: join.Keys, now: float) -> Shard:
    stats = {
        name: int(value) for name, value in client.hgetall(keys.stats).items() if value.lstrip("-").isdigit()
    }
    oldest = client.zrange(keys.due, 0, 0, withscores=True)
    overdue = max(0.0, now - oldest[0][1] / 1000) if oldest else 0.0
    return Shard(stats, client.zcard(keys.due), client.xlen(keys.ready), overdue)


def parse_report(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def judge(facts: RedisFacts) -> Iterator[Check]:
    yield _version(facts)
    yield _eviction(facts)
    yield _memory(facts)
    yield _persistence(facts)


def _version(facts: RedisFacts) -> Check:
    kind = "valkey_version" if "valkey_version" in facts.info else "redis_version"
    version = str(facts.info.get(kind, "?"))
    found = f"{KINDS[kind]} {version} at {facts.url}"
    numbers = str(facts.info.get("redis_version", "")).split(".")
    if tuple(int(n) for n in numbers[:2] if n.isdigit()) < OLDEST:
        return REDIS.fail("version", found, "Abreast needs Redis 7.0 or newer, or Valkey")
    return REDIS.ok("version", found)


def _eviction(facts: RedisFacts) -> Check:
    if facts.policy is None:
        return REDIS.warn(
            "eviction", "the server does not tell its maxmemory-policy", "make sure it is noeviction"
        )
    if facts.policy == "noeviction":
        return REDIS.ok("eviction", "maxmemory-policy is noeviction")
    found = f"maxmemory-policy is {facts.policy}: when memory is short, captures vanish uncounted"
    return REDIS.warn(
        "eviction", found, "set maxmemory-policy noeviction, or give Abreast a Redis of its own"
    )


def _memory(facts: RedisFacts) -> Check:
    used, limit = int(facts.info.get("used_memory", 0)), int(facts.info.get("maxmemory", 0))
    if not limit:
        return REDIS.ok("memory", f"{size(used)} used, no limit set")
    found = f"{size(used)} of {size(limit)} used"
    if used < limit * FULL:
        return REDIS.ok("memory", found)
    return REDIS.fail(
        "memory", found, "give it more memory, or lower the sampling: Redis refuses captures when it is full"
    )


def _persistence(facts: RedisFacts) -> Check:
    bad = [
        name
        for name in ("rdb_last_bgsave_status", "aof_last_write_status")
        if facts.info.get(name, "ok") != "ok"
    ]
    if bad:
        advice = "look into its log: is the disk full? Redis refuses writes then"
        return REDIS.fail("persistence", f"saving to disk fails ({', '.join(bad)})", advice)
    kept = (
        "append-only file"
        if facts.info.get("aof_enabled")
        else "no append-only file: a crash loses what waits there"
    )
    return REDIS.ok("persistence", kept)


def judge_registration(facts: RedisFacts, service: str) -> Iterator[Check]:
    if service in facts.unregistered:
        yield REDIS.fail(
            "registration",
            f"registration missing: captures of {service} lie here, but {join.SERVICES} does not name it, so no sidecar reads them",
            "a running service registers itself every few seconds: start it, or see its log; was a part of Redis deleted?",
        )


def judge_join(facts: RedisFacts, service: str, mirrored: int | None) -> Iterator[Check]:
    """`mirrored`: requests that Envoy says it mirrored, None for unknown."""
    joined, swept = facts.total(service, join.JOINED), facts.total(service, join.SWEPT)
    if not facts.total(service, join.RECEIVED):
        make = JOIN.warn if mirrored == 0 else JOIN.fail
        yield make(
            "captures", f"no capture of {service} has ever arrived", "see what is said of the services above"
        )
        return
    yield JOIN.ok("captures", f"{counted(facts.total(service, join.RECEIVED), 'capture')} arrived")
    yield _joined(joined, swept)
    yield from _refused(facts, service)
    yield _depth(facts, service)
    yield from _overdue(facts, service)


def _joined(joined: int, swept: int) -> Check:
    found = f"{counted(joined, 'pair')} joined, {count(swept)} with a missing capture ({part_of(swept, joined + swept) or '0%'})"
    if swept <= (joined + swept) * LONELY:
        return JOIN.ok("pairs", found)
    advice = "one version's captures are missing, or come later than the middleware's pair_timeout"
    return JOIN.warn("pairs", found, advice) if joined else JOIN.fail("pairs", found, advice)


def _refused(facts: RedisFacts, service: str) -> Iterator[Check]:
    refused = facts.total(service, join.SHED_PAIRS) + facts.total(service, join.SHED_BYTES)
    if refused:
        found = f"{counted(refused, 'capture')} refused so far, since as much waited as may wait"
        yield JOIN.warn(
            "refused", found, "is the sidecar's worker running and fast enough? or lower the sampling"
        )


def _depth(facts: RedisFacts, service: str) -> Check:
    shards = facts.shards.get(service, [])
    waiting, ready = sum(shard.waiting for shard in shards), sum(shard.ready for shard in shards)
    found = f"{counted(waiting, 'pair')} wait for a copy, {count(ready)} for a worker ({size(max(0, facts.total(service, 'bytes')))})"
    if ready < MANY:
        return JOIN.ok("queues", found)
    return JOIN.warn("queues", found, "is the sidecar's worker running and fast enough? (ABREAST_WORKERS)")


def _overdue(facts: RedisFacts, service: str) -> Iterator[Check]:
    overdue = max((shard.overdue for shard in facts.shards.get(service, [])), default=0.0)
    if overdue > STUCK:
        found = f"a pair waits for a copy since {seconds(overdue)} past its deadline: nothing sweeps"
        yield JOIN.fail(
            "sweep", found, "is the sidecar running, and does it use this Redis? see its log (worker)"
        )
