"""Limits what is stored: days and examples in the ledger, incomplete pairs and idle consumers in Redis."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from abreast.protocol.join import CONSUMER_GROUP, Keys
from abreast_sidecar.redis_client import load_script
from abreast_sidecar.store.database import AdvisoryLock, Connection, exclusive, execute, fetch_row, fetch_rows

MAX_CLOCK_SKEW_S = 300.0
EXPIRE_BATCH_PAIRS = 200  # Redis serves nobody else meanwhile
DELETE_CONSUMER_SCRIPT = load_script("delete_consumer")
EXPIRE_SCRIPT = load_script("expire_pairs")
AUDIT_RETENTION_DAYS = 365

log = structlog.get_logger(__name__)


async def conservative_now(connection: Connection, local_time: datetime | None = None) -> datetime:
    """Return the earlier of Postgres's time and this machine's, so that a wrong clock drops no recent data."""
    local_time = local_time or datetime.now(UTC)
    postgres_time: datetime = (await fetch_row(connection, "clock"))["now"]
    skew_s = (postgres_time - local_time).total_seconds()
    if abs(skew_s) > MAX_CLOCK_SKEW_S:
        log.warning(
            "the clocks of postgres and of this machine differ; retention uses the earlier time",
            postgres_ahead=round(skew_s),
        )
    return min(local_time, postgres_time)


@exclusive(AdvisoryLock.EXAMPLES, otherwise=0)
async def trim_examples(connection: Connection, *, max_bytes: int) -> int:
    """Delete the largest examples until all take at most `max_bytes`, compressed. Return how many were deleted.

    Each open finding keeps its smallest example.
    """
    cursor = await execute(connection, "examples_trim", {"max_bytes": max_bytes})
    if cursor.rowcount:
        log.info("large examples deleted", examples=cursor.rowcount, bytes=max_bytes)
    return cursor.rowcount


async def open_days(connection: Connection) -> None:
    """Open the partitions of today and tomorrow (UTC)."""
    await execute(connection, "days_open")


async def drop_days(
    connection: Connection, *, retention_days: int, retention_bytes: int = 0, now: datetime | None = None
) -> int:
    """Drop pairs, examples, samples and dead letters older than `retention_days`. Return the number of dropped days.

    While the rest takes more than `retention_bytes` (0: no limit), drop the oldest days too. Today is never dropped, and
    yesterday not before 01:00. Findings stay, and totals are folded into one row each. `now` is for tests.
    """
    count = await _drop_days(connection, retention_days=retention_days, retention_bytes=retention_bytes, now=now)
    if count:
        async with connection.transaction():
            await execute(connection, "releases_fold")
    return count


@exclusive(AdvisoryLock.RETENTION, otherwise=0)
async def _drop_days(connection: Connection, *, retention_days: int, retention_bytes: int, now: datetime | None) -> int:
    now = now or await conservative_now(connection)
    oldest = {"oldest": now - timedelta(days=retention_days)}
    await execute(connection, "bets_expire")
    for name in ("dead_letters_expire", "samples_expire", "reports_fold"):
        await execute(connection, name, oldest)
    await execute(connection, "audit_expire", {"oldest": now - timedelta(days=AUDIT_RETENTION_DAYS)})
    limits = {"days": retention_days, "bytes": retention_bytes, "now": now}
    expired_days = await fetch_rows(connection, "days_expired", limits)
    for row in expired_days:
        await execute(connection, "day_drop", {"day": row["day"]})
        log.info(
            "a day's pairs dropped",
            day=row["day"].isoformat(),
            bytes=row["bytes"],
            retention_days=retention_days,
            retention_bytes=retention_bytes,
        )
    return len(expired_days)


async def delete_idle_consumers(client: Redis, keys: Keys, *, idle_s: float) -> int:
    """Delete consumers that were idle for `idle_s` seconds and have no pending entries; return how many."""
    try:
        consumers = await client.xinfo_consumers(keys.ready, CONSUMER_GROUP)
    except ResponseError as error:
        if str(error).startswith(("no such key", "NOGROUP")):
            return 0  # no pair of the shard has been ready yet
        raise
    deleted = 0
    for consumer in consumers:
        if consumer["pending"] == 0 and consumer["idle"] > idle_s * 1000:
            deleted += int(await DELETE_CONSUMER_SCRIPT.run(client, [keys.ready], [CONSUMER_GROUP, consumer["name"]]))
    return deleted


async def expire_incomplete_pairs(client: Redis, keys: Keys, *, max_pairs: int = 20_000) -> int:
    """Move overdue pairs of a shard to its stream; return how many. After `max_pairs` others may still be overdue."""
    expired = 0
    while expired < max_pairs:
        batch_count = await EXPIRE_SCRIPT.run(
            client, [keys.due, keys.ready, keys.joined, keys.stats], [keys.pair(""), EXPIRE_BATCH_PAIRS, CONSUMER_GROUP]
        )
        expired += int(batch_count)
        if batch_count < EXPIRE_BATCH_PAIRS:
            break
    return expired
