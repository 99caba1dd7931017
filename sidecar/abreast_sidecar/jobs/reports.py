"""Brings what service processes and shards say of themselves from Redis into the ledger."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, TypedDict

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
    Keys,
    reports_key,
)
from abreast_sidecar.jobs.detectors import continue_counters
from abreast_sidecar.redis_client import list_shards, load_script, map_redis_errors
from abreast_sidecar.store.database import Connection, load_statement, sanitise_text, to_json

REPORTS_LOCK_KEY = 0x616272657002  # one sidecar at a time: an old look at Redis must not be written after a newer one
SHARD_COUNTERS = (RECEIVED, DUPLICATE, LATE, REJECTED_PAIRS, REJECTED_BYTES, JOINED, TIMED_OUT)
LIFE_FIELD = "life"  # field of `stats` that names the life of its counters: a Redis that lost its data has none
STALE_REPORT_S = 3600  # seconds after which the report of a dead process leaves Redis
MAX_PROCESS_ID_CHARS = 200  # characters
DELETE_REPORT_SCRIPT = load_script("leave")
READ_STATS_SCRIPT = load_script("look")


class ShardReport(TypedDict, total=False):
    life: str
    base: dict[str, int]
    last: dict[str, int]


async def collect_reports(connection: Connection, client: Redis) -> None:
    """Any number of sidecars may do it at once; one does."""
    async with connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": REPORTS_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return
        with map_redis_errors():
            shard_keys = await list_shards(client)
        await _collect_shards(connection, client, shard_keys)
        stale_reports = {
            service: await _collect_processes(connection, client, service)
            for service in {keys.service for keys in shard_keys}
        }
    for service, stale in stale_reports.items():  # only now that it is committed
        await _delete_stale_reports(client, service, stale)


async def _collect_shards(connection: Connection, client: Redis, shard_keys: list[Keys]) -> None:
    for keys in shard_keys:
        cursor = await connection.execute(
            load_statement("shard_report"), {"service": keys.service, "shard": keys.shard}
        )
        row = await cursor.fetchone()
        report = _build_shard_report(row["report"] if row else {}, await _read_stats(client, keys))
        parameters = {"service": keys.service, "shard": keys.shard, "report": to_json(report).decode()}
        await connection.execute(load_statement("shard_report_set"), parameters)


async def _read_stats(client: Redis, keys: Keys) -> dict[str, Any]:
    with map_redis_errors():
        raw, waiting, ready = await READ_STATS_SCRIPT.run(
            client, [keys.stats, keys.due, keys.ready], [uuid.uuid4().hex]
        )
    texts = [part.decode() for part in raw]
    stats = dict(zip(texts[::2], texts[1::2], strict=True))
    return {**stats, "waiting": waiting, "ready": ready}


def _build_shard_report(previous: ShardReport, stats: Mapping[str, Any]) -> dict[str, Any]:
    current = {name: int(stats.get(name, 0)) for name in SHARD_COUNTERS}
    same_life = previous.get("life", stats[LIFE_FIELD]) == stats[LIFE_FIELD]
    base, sums = continue_counters(previous.get("base", {}), previous.get("last", {}), current, is_same_life=same_life)
    gauges = {name: int(stats.get(name, 0)) for name in ("bytes", "waiting", "ready")}
    return {**sums, **gauges, "life": stats[LIFE_FIELD], "base": base, "last": current}


async def _collect_processes(connection: Connection, client: Redis, service: str) -> dict[str, bytes]:
    """Return the reports that may leave Redis: they have not changed for long."""
    with map_redis_errors():
        raw: dict[bytes, bytes] = await client.hgetall(reports_key(service))  # type: ignore[assignment]
    process_reports = {name: report for name, report in raw.items() if _is_object(report)}
    if not process_reports:
        return {}
    ids = {sanitise_text(name.decode(errors="replace"), MAX_PROCESS_ID_CHARS): name for name in process_reports}
    records = [{"id": id_, "report": orjson.Fragment(process_reports[name])} for id_, name in ids.items()]
    text = orjson.dumps(records)
    if b"\\u0000" in text:
        text = to_json([{"id": id_, "report": orjson.loads(process_reports[name])} for id_, name in ids.items()])
    parameters = {"service": service, "rows": text.decode(errors="replace"), "stale": STALE_REPORT_S}
    cursor = await connection.execute(load_statement("process_reports_set"), parameters)
    stale = {row["id"] for row in await cursor.fetchall()}
    return {ids[id_].decode(errors="replace"): process_reports[ids[id_]] for id_ in stale if id_ in ids}


def _is_object(report: bytes) -> bool:
    try:
        return isinstance(orjson.loads(report), dict)
    except orjson.JSONDecodeError:
        return False


async def _delete_stale_reports(client: Redis, service: str, stale: Mapping[str, bytes]) -> None:
    """Only what is still as it was written: a process may have come back to life."""
    with map_redis_errors():
        for process, report in stale.items():
            await DELETE_REPORT_SCRIPT.run(client, [reports_key(service)], [process, report])
