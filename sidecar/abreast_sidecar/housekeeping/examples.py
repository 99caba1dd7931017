"""Keeps the examples together below a size."""

from __future__ import annotations

import structlog

from abreast_sidecar.store.database import Connection, load_statement

EXAMPLES_LOCK_KEY = 0x616272657009

log = structlog.get_logger()


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
