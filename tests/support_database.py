"""Databases of tests. The tests of an xdist worker share one ledger, because emptying it costs a tenth of creating it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import psycopg
from psycopg.pq import ExecStatus

from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.store.migrate import migrate
from support import eventually

TUPLES = ExecStatus.TUPLES_OK  # also those without columns
_connections: dict[str, psycopg.Connection[Any]] = {}

LARGE = 1_000_000  # bytes: a table from here on is truncated, a smaller one is cheaper to delete from
RELATIONS = """
select relation.oid::regclass::text, relkind::text from pg_class as relation
where relnamespace::regnamespace::text in ('abreast', 'public') and relkind in ('r', 'p', 'v', 'm', 'S') and not relispartition
"""
PARTITIONS = "select oid::regclass::text from pg_class where relispartition and relkind = 'r'"
SCHEMAS = "select nspname::text from pg_namespace where nspname !~ '^pg_' and nspname not in ('abreast', 'information_schema', 'public')"
DEFINITIONS = """
select md5(string_agg(line, ' ' order by line)) from (
    select concat(attrelid::regclass, attname, atttypid, attnotnull) from pg_attribute join pg_class on attrelid = pg_class.oid
    where relnamespace = 'abreast'::regnamespace and not relispartition and attnum > 0
    union all select concat(proname, prosrc, proargtypes) from pg_proc where pronamespace = 'abreast'::regnamespace
    union all select concat(conrelid::regclass, conname) from pg_constraint join pg_class on conrelid = pg_class.oid
    where connamespace = 'abreast'::regnamespace and not relispartition
    union all select concat(tgrelid::regclass, tgname) from pg_trigger join pg_class on tgrelid = pg_class.oid
    where relnamespace = 'abreast'::regnamespace and not relispartition and not tgisinternal
) as definition (line)
"""
OTHERS = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'"
SEQUENCES = "select setval(format('%I.%I', schemaname, sequencename), start_value, false) from pg_sequences where last_value is not null"


class LedgerDatabase:
    """A ledger that returns to its first content."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute(f"create database {self.name}".encode())
        asyncio.run(migrate(self.url))
        self._session = psycopg.connect(self.url, autocommit=True, prepare_threshold=None)
        self._session.execute("set session_replication_role = replica")  # no triggers, no order of foreign keys
        self._relations = {row[0]: row[1] for row in self._rows(RELATIONS)}
        self._tables = [name for name, kind in self._relations.items() if kind in {"r", "p"}]
        self._definitions = self._rows(DEFINITIONS)
        self._seeds = {name: self._content(name) for name in self._filled()}

    @property
    def url(self) -> str:
        return self.server.url(self.name)

    def _rows(self, query: str) -> list[tuple[str, ...]]:
        return self._session.execute(query.encode()).fetchall()

    def _filled(self) -> list[str]:
        queries = [
            f"select '{name}', pg_total_relation_size('{name}')::text where exists (select from {name})"  # noqa: S608  # ours
            for name in self._tables
        ]
        counts = self._rows(" union all ".join(queries))
        self._large = {name for name, size in counts if int(size) > LARGE}
        return [name for name, _ in counts]

    def _content(self, table: str) -> bytes:
        with self._session.cursor().copy(f"copy {table} to stdout".encode()) as copy:
            return b"".join(bytes(part) for part in copy)

    def reset(self) -> bool:
        """End all sessions, and restore the content. Return False if a test changed the schema."""
        disconnect(self.url)
        self._rows(f"select pg_terminate_backend(pid) {OTHERS}")  # ours
        eventually(lambda: not self._rows(f"select {OTHERS}"), description="all sessions have ended")  # ours
        self._drop_what_was_added()
        if {row[0]: row[1] for row in self._rows(RELATIONS)} != self._relations or self._rows(
            DEFINITIONS
        ) != self._definitions:
            return False
        self._restore_rows()
        return True

    def clear(self) -> None:
        """Restore the content while a sidecar is connected."""
        self._drop_what_was_added()
        self._restore_rows()

    def _restore_rows(self) -> None:
        for name in self._filled():
            if name not in self._seeds or self._content(name) != self._seeds[name]:
                self._empty(name)
        for name in self._seeds.keys() - set(self._filled()):
            self._seed(name)
        self._rows(SEQUENCES)

    def _drop_what_was_added(self) -> None:
        for (name,) in self._rows(PARTITIONS):
            self._session.execute(f"drop table if exists {name} cascade".encode())
        for (name,) in self._rows(SCHEMAS):
            self._session.execute(f"drop schema {name} cascade".encode())
        for name, kind in self._rows(RELATIONS):
            if name not in self._relations and kind in {"r", "p"}:
                self._session.execute(f"drop table if exists {name} cascade".encode())

    def _empty(self, name: str) -> None:
        change = f"truncate {name} cascade" if name in self._large else f"delete from {name}"  # noqa: S608  # ours
        self._session.execute(change.encode())

    def _seed(self, name: str) -> None:
        with self._session.cursor().copy(f"copy {name} from stdin".encode()) as copy:
            copy.write(self._seeds[name])

    def drop(self) -> None:
        self._session.close()
        with psycopg.connect(self.server.url(), autocommit=True) as admin:
            admin.execute(f"drop database if exists {self.name} with (force)".encode())


class LedgerDatabases:
    """Lend one database to each test in turn. Use as a context manager."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self._free: LedgerDatabase | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._free is not None:
            self._free.drop()

    @contextmanager
    def lend(self) -> Iterator[LedgerDatabase]:
        database, self._free = self._free or LedgerDatabase(self.server), None
        yield database
        if self._free is None and database.reset():
            self._free = database
        else:
            database.drop()


@contextmanager
def empty_database(server: PostgresServer) -> Iterator[str]:
    """Yield the URL of a database without a schema."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
        yield server.url(name)
        disconnect(server.url(name))
        admin.execute(f"drop database {name} with (force)".encode())


def execute(url: str, query: str, parameters: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
    """Commit at once; with parameters, a percent sign is written twice. Begin another session if the server has ended this one."""
    is_open = url in _connections
    try:
        return _execute(url, query, parameters)
    except psycopg.OperationalError:
        connection = _connections.get(url)
        if not is_open or (connection is not None and not connection.closed):
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
    for known_url in [url] if url else list(_connections):
        connection = _connections.pop(known_url, None)
        if connection is not None:
            connection.close()
