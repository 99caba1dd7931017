"""Requests as the middleware makes them, for tests of what guards do in them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg

from abreast.backlog import Backlog
from abreast.capture import Role, Version
from abreast.context import CURRENT, Current
from abreast.ending import UNDER_WAY, end
from abreast.settings import Settings


@contextmanager
def inside(role: Role = "shadow", version: Version = "new") -> Iterator[Current]:
    """What it leaves to be done is left."""
    sink = Backlog(Settings(service="shop"))
    made = Current(version, role, "pair", "", sink, time.perf_counter_ns())
    made.ends = [] if made.shadow else None
    token = CURRENT.set(made)
    try:
        yield made
    finally:
        CURRENT.reset(token)


@asynccontextmanager
async def handled(role: Role = "shadow") -> AsyncIterator[Current]:
    """What it leaves to be done is done at its end."""
    with inside(role) as made:
        yield made
    end(made)
    await asyncio.gather(*UNDER_WAY)


def effects(made: Current) -> list[tuple[str, str, Any]]:
    records, _ = made.close(lambda payload: payload)
    return [(one["kind"], one.get("key", ""), one["payload"]) for one in records]


def rows(url: str, query: bytes = b"select id from placed order by id") -> list[Any]:
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute(query)]


def nothing_is_held(url: str) -> bool:
    """No session has a lock or an open transaction."""
    query = b"""select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
        and (xact_start is not null or exists (select from pg_locks where pg_locks.pid = pg_stat_activity.pid))"""
    return rows(url, query) == [0]
