"""Requests as the middleware runs them, for tests of the integrations."""

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
def in_request(role: Role = "shadow", version: Version = "new") -> Iterator[RequestContext]:
    """Enter a request. Its cleanups do not run."""
    sink = CaptureQueue(Settings(service="shop"))
    context = RequestContext(version, role, "pair", "", sink, time.perf_counter_ns())
    context.cleanups = [] if context.is_shadow else None
    token = CURRENT_CONTEXT.set(context)
    try:
        yield context
    finally:
        CURRENT_CONTEXT.reset(token)


@asynccontextmanager
async def handle_request(role: Role = "shadow") -> AsyncIterator[RequestContext]:
    """Enter a request, and run its cleanups at the end."""
    with in_request(role) as context:
        yield context
    run_cleanups(context)
    await asyncio.gather(*CLEANUP_TASKS)


def get_effects(context: RequestContext) -> list[tuple[str, str, Any]]:
    """Close the effect log. Return kind, key and payload of each effect."""
    records, _ = context.close_effect_log(lambda payload: payload)
    return [(record["kind"], record.get("key", ""), record["payload"]) for record in records]


def query_rows(url: str, query: bytes = b"select id from placed order by id") -> list[Any]:
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute(query)]


def has_no_locks(url: str) -> bool:
    """Return true if no other session has a lock or an open transaction."""
    query = b"""select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
        and (xact_start is not null or exists (select from pg_locks where pg_locks.pid = pg_stat_activity.pid))"""
    return query_rows(url, query) == [0]
