from __future__ import annotations

import asyncio
import re

import psycopg
import pytest

from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.store.migrate import Migration, load_migrations, migrate
from support_pairs import one, rows

pytestmark = pytest.mark.postgres

SECOND = Migration(2, "second", b"create table abreast.second (n integer)")


def test_migrations_have_no_gaps_and_clear_names() -> None:
    versions = [migration.version for migration in load_migrations()]

    assert versions == list(range(1, len(versions) + 1))
    assert all(re.fullmatch(r"[a-z][a-z_]+", migration.name) for migration in load_migrations())


async def test_migrate_creates_a_new_ledger_once(empty_postgres_url: str) -> None:
    first = await migrate(empty_postgres_url)
    applied = rows(empty_postgres_url, "select * from abreast.schema_version")
    again = await migrate(empty_postgres_url)

    assert first == again == len(load_migrations())
    assert rows(empty_postgres_url, "select * from abreast.schema_version") == applied


async def test_migrate_accepts_an_empty_schema_and_tables_beside_it(empty_postgres_url: str) -> None:
    execute(empty_postgres_url, "create schema abreast; create table public.orders (n integer)")

    assert await migrate(empty_postgres_url) == len(load_migrations())


async def test_migrate_runs_once_for_several_sidecars(empty_postgres_url: str) -> None:
    versions = await asyncio.gather(*(migrate(empty_postgres_url) for _ in range(8)))

    assert set(versions) == {len(load_migrations())}
    assert one(empty_postgres_url, "select count(*) from abreast.schema_version") == len(load_migrations())


async def test_migrate_applies_only_missing_versions(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, load_migrations()[:1])
    versions = await asyncio.gather(*(migrate(empty_postgres_url, with_second()) for _ in range(4)))

    assert set(versions) == {2}
    assert rows(empty_postgres_url, "select version, name from abreast.schema_version order by 1") == [
        (1, "schema"),
        (2, "second"),
    ]
    assert one(empty_postgres_url, "select count(*) from abreast.second") == 0


async def test_migrate_refuses_a_newer_version(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, with_second())
    with pytest.raises(
        SchemaError, match="has schema version 2, this abreast knows 1: run the newer abreast"
    ) as caught:
        await migrate(empty_postgres_url, load_migrations()[:1])

    assert empty_postgres_url.split(":")[2].split("@", maxsplit=1)[0] not in str(caught.value)  # the password


async def test_migrate_refuses_a_changed_file(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, with_second())

    with pytest.raises(SchemaError, match=r"a different version of 0002_second\.sql: .* create a new database"):
        await migrate(empty_postgres_url, (*load_migrations()[:1], Migration(2, "second", b"select 1")))
    with pytest.raises(SchemaError, match=r"a different version of schema\.sql: .* create a new database"):
        await migrate(empty_postgres_url, [Migration(1, "schema", b"select 1"), SECOND])


async def test_migrate_refuses_a_ledger_of_the_old_code(empty_postgres_url: str) -> None:
    execute(
        empty_postgres_url,
        "create schema abreast; create table abreast.migration (version integer); create table abreast.pair (id text)",
    )
    with pytest.raises(
        SchemaError, match=r"abreast\.migration\), which this abreast can't upgrade: create a new database"
    ):
        await migrate(empty_postgres_url)

    assert rows(empty_postgres_url, "select relname from pg_class where relname = 'endpoint'") == []


async def test_migrate_refuses_foreign_tables_in_its_schema(empty_postgres_url: str) -> None:
    execute(empty_postgres_url, "create schema abreast; create table abreast.orders (n integer)")

    with pytest.raises(SchemaError, match=r"no ledger \(orders, \.\.\.\): create a new database"):
        await migrate(empty_postgres_url)


async def test_failed_migration_leaves_nothing_behind(empty_postgres_url: str) -> None:
    broken = Migration(2, "broken", b"create table abreast.half (n integer); select 1/0")
    with pytest.raises(LedgerError, match="division by zero"):
        await migrate(empty_postgres_url, (*load_migrations()[:1], broken))

    assert one(empty_postgres_url, "select to_regnamespace('abreast')") is None


def with_second() -> tuple[Migration, ...]:
    return (*load_migrations()[:1], SECOND)


def execute(url: str, sql: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.encode())


async def test_migrate_reports_an_unreachable_postgres() -> None:
    with pytest.raises(LedgerError, match="postgres can't be reached, check ABREAST_POSTGRES_URL"):
        await migrate("postgresql://postgres@127.0.0.1:1/postgres")


async def test_open_day_creates_a_day_once(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url)

    async def open_day() -> None:
        async with await psycopg.AsyncConnection.connect(empty_postgres_url, autocommit=True) as connection:
            await connection.execute("select abreast.open_day(date '2026-01-31' + n) from generate_series(0, 2) as n")

    await asyncio.gather(*(open_day() for _ in range(6)))

    found = rows(
        empty_postgres_url,
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'abreast.pair'::regclass order by 1",
    )
    assert [name for (name,) in found] == [f"abreast.pair_{day}" for day in ("20260131", "20260201", "20260202")]


async def test_migrate_refuses_another_encoding(empty_postgres_url: str) -> None:
    base, _, _ = empty_postgres_url.rpartition("/")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("drop database if exists latin")
        connection.execute("create database latin encoding 'LATIN1' locale 'C' template template0")

    with pytest.raises(SchemaError, match="has the encoding LATIN1: name one"):
        await migrate(f"{base}/latin")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("drop database latin")
