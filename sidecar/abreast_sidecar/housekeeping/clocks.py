"""What time it is, where two clocks say different things."""

from __future__ import annotations

from datetime import UTC, datetime

import structlog

from abreast_sidecar.store.database import Connection, statement

APART = 300.0  # seconds

log = structlog.get_logger()


async def surely(connection: Connection, own: datetime | None = None) -> datetime:
    """By Postgres's clock or this machine's, whichever is behind: what is young by one of them is not dropped because
    of the other. `own` is this machine's.
    """
    own = own or datetime.now(UTC)
    row = await (await connection.execute(statement("clock"))).fetchone()
    theirs: datetime = row["now"] if row else own
    ahead = (theirs - own).total_seconds()
    if abs(ahead) > APART:
        log.warning(
            "the clocks of postgres and of this machine differ; nothing is dropped that is young by one of them",
            postgres_ahead=round(ahead),
        )
    return min(own, theirs)
