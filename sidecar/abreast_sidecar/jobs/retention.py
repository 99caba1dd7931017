"""Opens the days that come and drops those that are over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import structlog

from abreast_sidecar.store.database import Connection, load_statement

MAX_CLOCK_SKEW_S = 300.0  # seconds

log = structlog.get_logger()


async def conservative_now(connection: Connection, local_time: datetime | None = None) -> datetime:
    """By Postgres's clock or this machine's, whichever is behind: what is young by one of them is not dropped because
    of the other. `own` is this machine's.
    """
    local_time = local_time or datetime.now(UTC)
    row = await (await connection.execute(load_statement("clock"))).fetchone()
    postgres_time: datetime = row["now"] if row else local_time
    skew_s = (postgres_time - local_time).total_seconds()
    if abs(skew_s) > MAX_CLOCK_SKEW_S:
        log.warning(
            "the clocks of postgres and of this machine differ; nothing is dropped that is young by one of them",
            postgres_ahead=round(skew_s),
        )
    return min(local_time, postgres_time)


EXAMPLES_LOCK_KEY = 0x616272657009


async def trim_examples(connection: Connection, *, max_bytes: int) -> int:
    """Drop the largest until at most `most` bytes are left, compressed, but one of each open finding; return how many."""
    async with connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": EXAMPLES_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        cursor = await connection.execute(load_statement("examples_trim"), {"max_bytes": max_bytes})
    if cursor.rowcount:
        log.info("examples are dropped, the largest first", examples=cursor.rowcount, bytes=max_bytes)
    return cursor.rowcount


RETENTION_LOCK_KEY = 0x616272657004


async def open_days(connection: Connection) -> None:
    """Today and tomorrow, UTC."""
    await connection.execute(load_statement("days_open"))


async def drop_days(
    connection: Connection, *, retention_days: int, retention_bytes: int = 0, now: datetime | None = None
) -> int:
    """Drop pairs, examples, samples and poison that are older, then the oldest days while all take more than `retention_bytes`
    (0: no limit); never today, nor yesterday before one o'clock. `now` is by the clock that is behind unless given. Return
    how many days went. Findings stay; sums of what is gone stay as one row each.
    """
    dropped = 0
    async with connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": RETENTION_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        now = now or await conservative_now(connection)
        oldest = {"oldest": now - timedelta(days=retention_days)}
        for name in ("dead_letters_expire", "samples_expire", "reports_fold"):
            await connection.execute(load_statement(name), oldest)
        limits = {"days": retention_days, "bytes": retention_bytes, "now": now}
        cursor = await connection.execute(load_statement("days_expired"), limits)
        for day in await cursor.fetchall():
            await connection.execute(load_statement("day_drop"), {"day": day["day"]})
            log.info(
                "a day's pairs are dropped",
                day=day["day"].isoformat(),
                bytes=day["bytes"],
                retention_days=retention_days,
                retention_bytes=retention_bytes,
            )
            dropped += 1
    if dropped:
        async with connection.transaction():
            await connection.execute(load_statement("releases_fold"))
    return dropped
