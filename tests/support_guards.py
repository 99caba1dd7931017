"""Requests as the middleware makes them, for tests of what guards do in them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg

from abreast.context import CLEANUP_TASKS, CURRENT_CONTEXT, RequestContext, run_cleanups
from abreast.export.queue import CaptureQueue
from abreast.protocol.capture import Role, Version
from abreast.settings import Settings


@contextmanager
def inside(role: Role = "shadow", version: Version = "new") -> Iterator[RequestContext]:
    """What it leaves to be done is left."""
    sink = CaptureQueue(Settings(service="shop"))
    made = RequestContext(version, role, "pair", "", sink, time.perf_counter_ns())
    made.cleanups = [] if made.is_shadow else None
    token = CURRENT_CONTEXT.set(made)
    try:
        yield made
    finally:
        CURRENT_CONTEXT.reset(token)


@asynccontextmanager
async def handled(role: Role = "shadow") -> AsyncIterator[RequestContext]:
    """What it leaves to be done is done at its end."""
    with inside(role) as made:
        yield made
    run_cleanups(made)
    await asyncio.gather(*CLEANUP_TASKS)


def effects(made: RequestContext) -> list[tuple[str, str, Any]]:
    records, _ = made.close_effect_log(lambda payload: payload)
    return [(one["kind"], one.get("key", ""), one["payload"]) for one in records]


def rows(url: str, query: bytes = b"select id from placed order by id") -> list[Any]:
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute(query)]


def nothing_is_held(url: str) -> bool:
    """No session has a lock or an open transaction."""
    query = b"""select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
        and (xact_start is not null or exists (select from pg_locks where pg_locks.pid = pg_stat_activity.pid))"""
    return rows(url, query) == [0]
