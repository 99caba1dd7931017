"""What people say of findings: that one is confirmed, expected, fixed, or open after all. Each word is kept, with who and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from abreast_sidecar.errors import ArgumentError, NotFoundError
from abreast_sidecar.store.database import Database, load_statement

SETTABLE_STATUSES = ("open", "confirmed", "expected", "fixed")  # `reopened` happens by itself


@dataclass(frozen=True, slots=True)
class StatusChange:
    """`release`: of new, that has the fix; empty unless the status is `fixed`, and where none is named."""

    status: str
    actor: str
    reason: str
    release: str = ""


async def set_status(database: Database, finding_id: int, change: StatusChange) -> None:
    """Raise NotFoundError, or ArgumentError where what is said to be fixed was seen in that release or a later one."""
    async with database.connection() as connection, connection.transaction():
        # Workers that write the finding lock it too: it is either counted before, or told from here on.
        cursor = await connection.execute(load_statement("findings_lock"), {"ids": [finding_id]})
        if not await cursor.fetchall():
            raise NotFoundError(f"the ledger holds no finding {finding_id}; list them with ListFindings")
        cursor = await connection.execute(
            load_statement("finding_status_set"), {"id": finding_id, **asdict(change)}
        )
        if not await cursor.fetchall():
            raise ArgumentError(
                f"finding {finding_id} can't be fixed in release {change.release!r}: that release or a later one has "
                "shown it; name a later one, or none"
            )
