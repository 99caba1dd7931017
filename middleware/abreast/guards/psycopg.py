"""psycopg 3 for a service that is shadowed: what a shadow request writes is recorded and rolled back.

    from abreast.guards.psycopg import AsyncConnection  # instead of psycopg's

See docs/database.md for what a rollback can't undo, and abreast.guards.psycopg_pool for pools.
"""

from __future__ import annotations

from abreast.guards.psycopg_async import AsyncConnection, AsyncCursor, AsyncServerCursor
from abreast.guards.psycopg_sync import Connection, Cursor, ServerCursor

__all__ = ["AsyncConnection", "AsyncCursor", "AsyncServerCursor", "Connection", "Cursor", "ServerCursor"]
