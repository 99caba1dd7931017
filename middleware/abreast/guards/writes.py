"""What a connection has written and not committed yet. Recorded as effects once it would last."""

from __future__ import annotations

from typing import Any

from abreast.context import CURRENT, Current
from abreast.effects import record
from abreast.guards.statement import Statement

MOST = 200  # of a transaction: as many as are recorded of a request
MOST_ROWS = 20  # of one executemany whose values are recorded


class Writes:
    def __init__(self) -> None:
        self._waiting: list[tuple[Current, Statement, Any]] = []

    def add(self, known: Statement, payload: dict[str, Any]) -> None:
        request = CURRENT.get()
        if request.recorded and len(self._waiting) < MOST:
            self._waiting.append((request, known, payload))

    def mark(self) -> int:
        return len(self._waiting)

    def cut(self, mark: int = 0) -> None:
        """What came since was rolled back."""
        del self._waiting[mark:]

    def flush(self) -> None:
        """It was committed, or would have been."""
        waiting, self._waiting = self._waiting, []
        for request, known, payload in waiting:
            token = CURRENT.set(request)
            try:
                record(f"db.{known.said}".replace(" ", "."), payload)  # so that a finding names the table
            finally:
                CURRENT.reset(token)


def of_one(known: Statement, given: Any) -> dict[str, Any]:
    """`values` under the names of columns or placeholders, so that secrets among them are known by name."""
    values = known.values(given)
    return {"statement": known.shape} if values is None else {"statement": known.shape, "values": values}


def of_many(known: Statement, given: list[Any]) -> dict[str, Any]:
    rows = [known.values(row) for row in given[:MOST_ROWS]]
    return {"statement": known.shape, "rows": len(given), "values": rows}
