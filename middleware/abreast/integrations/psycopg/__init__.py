"""psycopg 3 for services that receive shadow requests: writes of a shadow are recorded and rolled back.

    from abreast.integrations.psycopg import AsyncConnection  # instead of psycopg's

See docs/database.md for the limits of a rollback, and `abreast.integrations.psycopg_pool` for pools.
"""

from __future__ import annotations

from abreast.integrations.psycopg.connection import Connection, Cursor, ServerCursor
from abreast.integrations.psycopg.connection_async import AsyncConnection, AsyncCursor, AsyncServerCursor

__all__ = ["AsyncConnection", "AsyncCursor", "AsyncServerCursor", "Connection", "Cursor", "ServerCursor"]
