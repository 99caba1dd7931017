"""What a connection has written and not committed yet. Recorded as effects once it would last."""

from __future__ import annotations

from typing import Any

from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.effects import record
from abreast.guards.statement import Statement

MAX_PENDING_WRITES = 200  # of a transaction: as many as are recorded of a request
MAX_RECORDED_ROWS = 20  # of one executemany whose values are recorded


class PendingWrites:
    def __init__(self) -> None:
        self._writes: list[tuple[RequestContext, Statement, Any]] = []

    def add(self, sql_statement: Statement, payload: dict[str, Any]) -> None:
        context = CURRENT_CONTEXT.get()
        if context.is_captured and len(self._writes) < MAX_PENDING_WRITES:
            self._writes.append((context, sql_statement, payload))

    def savepoint(self) -> int:
        return len(self._writes)

    def rollback_to(self, savepoint: int = 0) -> None:
        """What came since was rolled back."""
        del self._writes[savepoint:]

    def commit(self) -> None:
        """It was committed, or would have been."""
        writes, self._writes = self._writes, []
        for context, sql_statement, payload in writes:
            token = CURRENT_CONTEXT.set(context)
            try:
                record(
                    f"db.{sql_statement.label}".replace(" ", "."), payload
                )  # so that a finding names the table
            finally:
                CURRENT_CONTEXT.reset(token)


def payload_for_one(sql_statement: Statement, params: Any) -> dict[str, Any]:
    """`values` under the names of columns or placeholders, so that secrets among them are known by name."""
    values = sql_statement.name_values(params)
    return (
        {"statement": sql_statement.shape}
        if values is None
        else {"statement": sql_statement.shape, "values": values}
    )


def payload_for_many(sql_statement: Statement, params_seq: list[Any]) -> dict[str, Any]:
    rows = [sql_statement.name_values(row) for row in params_seq[:MAX_RECORDED_ROWS]]
    return {"statement": sql_statement.shape, "rows": len(params_seq), "values": rows}
