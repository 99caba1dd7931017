"""Looks for endpoints that new does not answer at all: a version that hangs leaves no capture, and so no difference."""

from __future__ import annotations

from abreast_sidecar.store.database import Connection, statement

WINDOW = 3600  # seconds
MOST = 1000  # pairs of an endpoint, the newest
LEAST = 10  # pairs without a capture of new
SHARE = 0.05  # of the endpoint's pairs


async def find_missing(connection: Connection) -> int:
    """Return how many endpoints it is so for. The finding stays when it is no longer so, with when it was last."""
    parameters = {"window": WINDOW, "limit": MOST, "min_pairs": LEAST, "share": SHARE}
    async with connection.transaction():
        cursor = await connection.execute(statement("missing_findings_set"), parameters)
        await connection.execute(statement("findings_reopen"))
    return cursor.rowcount
