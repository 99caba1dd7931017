"""Keeps the examples together below a size."""

from __future__ import annotations

import structlog

from abreast_sidecar.store.database import Connection, statement

LOCK = 0x616272657009

log = structlog.get_logger()


async def trim_examples(connection: Connection, *, most: int) -> int:
    """Drop the largest until at most `most` bytes are left, compressed, but one of each open finding; return how many."""
    async with connection.transaction():
        cursor = await connection.execute(statement("lock_try"), {"lock": LOCK})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        cursor = await connection.execute(statement("examples_trim"), {"max_bytes": most})
    if cursor.rowcount:
        log.info("examples are dropped, the largest first", examples=cursor.rowcount, bytes=most)
    return cursor.rowcount
