"""One connection for all that a test reads and writes in a database: each new one costs 10 ms of CPU."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.pq import ExecStatus

TUPLES = ExecStatus.TUPLES_OK  # also those without columns

_connections: dict[str, psycopg.Connection[Any]] = {}


def execute(url: str, query: str, parameters: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
    """Commit at once; with parameters, a percent sign is written twice. Begin another session if the server has ended this one."""
    kept = url in _connections
    try:
        return _execute(url, query, parameters)
    except psycopg.OperationalError:
        connection = _connections.get(url)
        if not kept or (connection is not None and not connection.closed):
            raise
        return _execute(url, query, parameters)


def _execute(url: str, query: str, parameters: tuple[Any, ...] | None) -> list[tuple[Any, ...]]:
    connection = _connections.get(url)
    if connection is None or connection.closed:
        connection = psycopg.connect(url, autocommit=True, prepare_threshold=None)
        _connections[url] = connection
    cursor = connection.execute(query.encode(), parameters)
    result = cursor.pgresult
    return cursor.fetchall() if result is not None and result.status == TUPLES else []


def disconnect(url: str | None = None) -> None:
    """From one database, or from all."""
    for known in [url] if url else list(_connections):
        connection = _connections.pop(known, None)
        if connection is not None:
            connection.close()
