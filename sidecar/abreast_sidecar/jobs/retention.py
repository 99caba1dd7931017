"""Opens the partitions of coming days, drops old ones, and limits the size of examples."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import structlog

from abreast_sidecar.store.database import AdvisoryLock, Connection, exclusive, fetch_row, fetch_rows, load_statement

MAX_CLOCK_SKEW_S = 300.0

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
    cursor = await connection.execute(load_statement("examples_trim"), {"max_bytes": max_bytes})
    if cursor.rowcount:
        log.info("large examples deleted", examples=cursor.rowcount, bytes=max_bytes)
    return cursor.rowcount


async def open_days(connection: Connection) -> None:
    """Open the partitions of today and tomorrow (UTC)."""
    await connection.execute(load_statement("days_open"))


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
            await connection.execute(load_statement("releases_fold"))
    return count


@exclusive(AdvisoryLock.RETENTION, otherwise=0)
async def _drop_days(connection: Connection, *, retention_days: int, retention_bytes: int, now: datetime | None) -> int:
    now = now or await conservative_now(connection)
    oldest = {"oldest": now - timedelta(days=retention_days)}
    for name in ("dead_letters_expire", "samples_expire", "reports_fold"):
        await connection.execute(load_statement(name), oldest)
    limits = {"days": retention_days, "bytes": retention_bytes, "now": now}
    expired_days = await fetch_rows(connection, "days_expired", limits)
    for row in expired_days:
        await connection.execute(load_statement("day_drop"), {"day": row["day"]})
        log.info(
            "a day's pairs dropped",
            day=row["day"].isoformat(),
            bytes=row["bytes"],
            retention_days=retention_days,
            retention_bytes=retention_bytes,
        )
    return len(expired_days)
