"""Brings what service processes and shards say of themselves from Redis into the ledger."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, TypedDict

import orjson
from redis.asyncio import Redis

from abreast.join import (
    DUPLICATE,
    JOINED,
    LATE,
    RECEIVED,
    SHED_BYTES,
    SHED_PAIRS,
    SWEPT,
    Keys,
    reports,
)
from abreast_sidecar.housekeeping.counters import carried_on
from abreast_sidecar.read import shards, translated
from abreast_sidecar.read.client import script
from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import Connection, statement

LOCK = 0x616272657002  # one sidecar at a time: an old look at Redis must not be written after a newer one
COUNTERS = (RECEIVED, DUPLICATE, LATE, SHED_PAIRS, SHED_BYTES, JOINED, SWEPT)
LIFE = "life"  # field of `stats` that names the life of its counters: a Redis that lost its data has none
STALE = 3600  # seconds after which the report of a dead process leaves Redis
ID_LIMIT = 200  # characters
LEAVE = script("leave")
LOOK = script("look")


class ShardReport(TypedDict, total=False):
    life: str
    base: dict[str, int]
    last: dict[str, int]


async def bring_reports(connection: Connection, client: Redis) -> None:
    """Any number of sidecars may do it at once; one does."""
    async with connection.transaction():
        cursor = await connection.execute(statement("lock_try"), {"lock": LOCK})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return
        with translated():
            known = await shards(client)
        await _bring_shards(connection, client, known)
        written = {
            service: await _bring_processes(connection, client, service)
            for service in {k.service for k in known}
        }
    for service, stale in written.items():  # only now that it is committed
        await _leave(client, service, stale)


async def _bring_shards(connection: Connection, client: Redis, known: list[Keys]) -> None:
    for keys in known:
        cursor = await connection.execute(
            statement("shard_report"), {"service": keys.service, "shard": keys.shard}
        )
        row = await cursor.fetchone()
        report = _shard_report(row["report"] if row else {}, await _look(client, keys))
        parameters = {"service": keys.service, "shard": keys.shard, "report": json_text(report).decode()}
        await connection.execute(statement("shard_report_set"), parameters)


async def _look(client: Redis, keys: Keys) -> dict[str, Any]:
    with translated():
        raw, waiting, ready = await LOOK.run(client, [keys.stats, keys.due, keys.ready], [uuid.uuid4().hex])
    texts = [one.decode() for one in raw]
    stats = dict(zip(texts[::2], texts[1::2], strict=True))
    return {**stats, "waiting": waiting, "ready": ready}


def _shard_report(before: ShardReport, seen: Mapping[str, Any]) -> dict[str, Any]:
    now = {name: int(seen.get(name, 0)) for name in COUNTERS}
    same_life = before.get("life", seen[LIFE]) == seen[LIFE]
    base, sums = carried_on(before.get("base", {}), before.get("last", {}), now, same_life=same_life)
    gauges = {name: int(seen.get(name, 0)) for name in ("bytes", "waiting", "ready")}
    return {**sums, **gauges, "life": seen[LIFE], "base": base, "last": now}


async def _bring_processes(connection: Connection, client: Redis, service: str) -> dict[str, bytes]:
    """Return the reports that may leave Redis: they have not changed for long."""
    with translated():
        raw: dict[bytes, bytes] = await client.hgetall(reports(service))  # type: ignore[assignment]
    told = {name: report for name, report in raw.items() if _is_object(report)}
    if not told:
        return {}
    ids = {clean(name.decode(errors="replace"), ID_LIMIT): name for name in told}
    given = [{"id": id_, "report": orjson.Fragment(told[name])} for id_, name in ids.items()]
    text = orjson.dumps(given)
    if b"\\u0000" in text:
        text = json_text([{"id": id_, "report": orjson.loads(told[name])} for id_, name in ids.items()])
    parameters = {"service": service, "rows": text.decode(errors="replace"), "stale": STALE}
    cursor = await connection.execute(statement("process_reports_set"), parameters)
    stale = {row["id"] for row in await cursor.fetchall()}
    return {ids[id_].decode(errors="replace"): told[ids[id_]] for id_ in stale if id_ in ids}


def _is_object(report: bytes) -> bool:
    try:
        return isinstance(orjson.loads(report), dict)
    except orjson.JSONDecodeError:
        return False


async def _leave(client: Redis, service: str, stale: Mapping[str, bytes]) -> None:
    """Only what is still as it was written: a process may have come back to life."""
    with translated():
        for process, report in stale.items():
            await LEAVE.run(client, [reports(service)], [process, report])
