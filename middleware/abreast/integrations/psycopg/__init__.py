"""psycopg 3 for a service that is shadowed: what a shadow request writes is recorded and rolled back.

    from abreast.integrations.psycopg import AsyncConnection  # instead of psycopg's

See docs/database.md for what a rollback can't undo, and abreast.integrations.psycopg.pool for pools.
"""

from __future__ import annotations

from abreast.integrations.psycopg.connection import Connection, Cursor, ServerCursor
from abreast.integrations.psycopg.connection_async import AsyncConnection, AsyncCursor, AsyncServerCursor

__all__ = ["AsyncConnection", "AsyncCursor", "AsyncServerCursor", "Connection", "Cursor", "ServerCursor"]
