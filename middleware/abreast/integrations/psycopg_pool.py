"""psycopg_pool for services that receive shadow requests.

    from abreast.integrations.psycopg_pool import AsyncConnectionPool  # instead of psycopg_pool

Shadow requests take connections from a separate, small pool. Users never wait for a connection that a shadow uses, and
no session changes sides. A returned connection is reused within the same shadow request, in the same transaction, so
the request reads its own writes. At the end of the request, everything is rolled back.
"""

from __future__ import annotations

from abreast.integrations.psycopg.pool import ConnectionPool
from abreast.integrations.psycopg.pool_async import AsyncConnectionPool

__all__ = ["AsyncConnectionPool", "ConnectionPool"]
