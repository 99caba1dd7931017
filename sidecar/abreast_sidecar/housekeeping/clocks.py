"""What time it is, where two clocks say different things."""

from __future__ import annotations

from datetime import UTC, datetime

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
