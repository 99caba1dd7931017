"""Looks for endpoints that new does not answer at all: a version that hangs leaves no capture, and so no difference."""

from __future__ import annotations

from abreast_sidecar.store.database import Connection, load_statement

UNANSWERED_WINDOW_S = 3600  # seconds
MAX_UNANSWERED_PAIRS = 1000  # pairs of an endpoint, the newest
MIN_UNANSWERED_PAIRS = 10  # pairs without a capture of new
MIN_UNANSWERED_SHARE = 0.05  # of the endpoint's pairs


async def detect_unanswered(connection: Connection) -> int:
    """Return how many endpoints it is so for. The finding stays when it is no longer so, with when it was last."""
    parameters = {
        "window": UNANSWERED_WINDOW_S,
        "limit": MAX_UNANSWERED_PAIRS,
        "min_pairs": MIN_UNANSWERED_PAIRS,
        "share": MIN_UNANSWERED_SHARE,
    }
    async with connection.transaction():
        cursor = await connection.execute(load_statement("missing_findings_set"), parameters)
        await connection.execute(load_statement("findings_reopen"))
    return cursor.rowcount
