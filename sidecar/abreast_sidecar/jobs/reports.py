"""Copies the reports of service processes and the counters of shards from Redis to the ledger."""

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
from abreast_sidecar.jobs.cumulative import continue_counters
from abreast_sidecar.redis_client import list_shards, load_script, map_redis_errors
from abreast_sidecar.store.database import (
    AdvisoryLock,
    Connection,
    exclusive,
    fetch_rows,
    load_statement,
    sanitise_text,
    to_json,
)

SHARD_COUNTERS = (RECEIVED, DUPLICATE, LATE, REJECTED_PAIRS, REJECTED_BYTES, JOINED, TIMED_OUT)
StaleReports = dict[str, dict[str, bytes]]  # by service and process

LIFE_FIELD = "life"  # identifies the life of the counters: a Redis that lost its data begins a new one
STALE_REPORT_S = 3600  # the report of a dead process leaves Redis after it
MAX_PROCESS_ID_CHARS = 200
DELETE_REPORT_SCRIPT = load_script("delete_report")
READ_STATS_SCRIPT = load_script("read_stats")
NO_REPORTS: StaleReports = {}


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
        key = {"service": keys.service, "shard": keys.shard}
        rows = await fetch_rows(connection, "shard_report", key)
        report = _build_shard_report(rows[0]["report"] if rows else {}, await _read_stats(client, keys))
        await connection.execute(load_statement("shard_report_set"), {**key, "report": to_json(report).decode()})
    services = {keys.service for keys in shard_keys}
    return {service: await _copy_process_reports(connection, client, service) for service in services}


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
    is_same_life = previous.get("life", stats[LIFE_FIELD]) == stats[LIFE_FIELD]
    base, sums = continue_counters(
        previous.get("base", {}), previous.get("last", {}), current, is_same_life=is_same_life
    )
    gauges = {name: int(stats.get(name, 0)) for name in ("bytes", "waiting", "ready")}
    return {**sums, **gauges, "life": stats[LIFE_FIELD], "base": base, "last": current}


async def _copy_process_reports(connection: Connection, client: Redis, service: str) -> dict[str, bytes]:
    """Return the reports that have not changed for STALE_REPORT_S, by process."""
    with map_redis_errors():
        raw: dict[bytes, bytes] = await client.hgetall(reports_key(service))  # type: ignore[assignment]
    process_reports = {name: report for name, report in raw.items() if _is_object(report)}
    if not process_reports:
        return {}
    ids = {sanitise_text(name.decode(errors="replace"), MAX_PROCESS_ID_CHARS): name for name in process_reports}
    text = orjson.dumps([{"id": id_, "report": orjson.Fragment(process_reports[name])} for id_, name in ids.items()])
    if b"\\u0000" in text:
        text = to_json([{"id": id_, "report": orjson.loads(process_reports[name])} for id_, name in ids.items()])
    parameters = {"service": service, "rows": text.decode(errors="replace"), "stale": STALE_REPORT_S}
    stale = {row["id"] for row in await fetch_rows(connection, "process_reports_set", parameters)}
    return {ids[id_].decode(errors="replace"): process_reports[ids[id_]] for id_ in stale if id_ in ids}


def _is_object(report: bytes) -> bool:
    try:
        return isinstance(orjson.loads(report), dict)
    except orjson.JSONDecodeError:
        return False
