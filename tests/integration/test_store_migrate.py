from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg
import pytest
from click.testing import CliRunner

from abreast.v1 import traffic_pb2
from abreast_sidecar.cli import abreast
from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.jobs.retention import drop_days
from abreast_sidecar.store.migrate import Migration, load_migrations, migrate
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_pairs import difference, make_record, query_value, rows
from support_serve import run_sidecar

pytestmark = pytest.mark.postgres

SECOND = Migration(2, "second", b"create table abreast.second (n integer)")


def test_migrations_have_no_gaps_and_clear_names() -> None:
    versions = [migration.version for migration in load_migrations()]

    assert versions == list(range(1, len(versions) + 1))
    assert all(re.fullmatch(r"[a-z][a-z_]+", migration.name) for migration in load_migrations())


async def test_migrate_creates_a_new_ledger_once(empty_postgres_url: str) -> None:
    first = await migrate(empty_postgres_url)
    applied = rows(empty_postgres_url, "select * from abreast.schema_version")
    second = await migrate(empty_postgres_url)

    assert first == second == len(load_migrations())
    assert rows(empty_postgres_url, "select * from abreast.schema_version") == applied


async def test_migrate_accepts_an_empty_schema_and_tables_beside_it(empty_postgres_url: str) -> None:
    execute(empty_postgres_url, "create schema abreast; create table public.orders (n integer)")

    assert await migrate(empty_postgres_url) == len(load_migrations())


async def test_migrate_runs_once_for_several_sidecars(empty_postgres_url: str) -> None:
    versions = await asyncio.gather(*(migrate(empty_postgres_url) for _ in range(8)))

    assert set(versions) == {len(load_migrations())}
    assert query_value(empty_postgres_url, "select count(*) from abreast.schema_version") == len(load_migrations())


async def test_migrate_applies_only_missing_versions(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, load_migrations()[:1])
    versions = await asyncio.gather(*(migrate(empty_postgres_url, with_second()) for _ in range(4)))

    assert set(versions) == {2}
    assert rows(empty_postgres_url, "select version, name from abreast.schema_version order by 1") == [
        (1, "schema"),
        (2, "second"),
    ]
    assert query_value(empty_postgres_url, "select count(*) from abreast.second") == 0


async def test_migrate_refuses_a_newer_version(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, with_second())
    with pytest.raises(SchemaError, match="has schema version 2, this abreast knows 1: run the newer abreast") as error:
        await migrate(empty_postgres_url, load_migrations()[:1])

    assert empty_postgres_url.split(":")[2].split("@", maxsplit=1)[0] not in str(error.value)  # the password


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

    assert query_value(empty_postgres_url, "select to_regnamespace('abreast')") is None


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

    partitions = rows(
        empty_postgres_url,
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'abreast.pair'::regclass order by 1",
    )
    assert [name for (name,) in partitions] == [f"abreast.pair_{day}" for day in ("20260131", "20260201", "20260202")]


async def test_migrate_refuses_another_encoding(empty_postgres_url: str) -> None:
    base, _, _ = empty_postgres_url.rpartition("/")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("drop database if exists latin")
        connection.execute("create database latin encoding 'LATIN1' locale 'C' template template0")

    with pytest.raises(SchemaError, match="has the encoding LATIN1: name one"):
        await migrate(f"{base}/latin")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("drop database latin")


@pytest.fixture
def role_urls(empty_postgres_url: str) -> Iterator[dict[str, str]]:
    """Migrate the ledger as its owner for two roles without other rights, and return their URLs."""
    parts, names = urlsplit(empty_postgres_url), {kind: f"{kind}_{uuid.uuid4().hex}" for kind in ("writer", "reader")}
    for name in names.values():
        execute(empty_postgres_url, f"create role {name} login password 'secret'")
    try:
        command = ["migrate", "--postgres-url", empty_postgres_url]
        options = [word for kind, name in names.items() for word in (f"--{kind}", name)]
        result = CliRunner().invoke(abreast, [*command, *options])
        assert result.exit_code == 0, result.output
        yield {
            kind: parts._replace(netloc=f"{name}:secret@{parts.netloc.rpartition('@')[2]}").geturl()
            for kind, name in names.items()
        }
    finally:
        for name in names.values():
            execute(empty_postgres_url, f"drop owned by {name}; drop role {name}")


def assert_refused(url: str, *statements: str) -> None:
    for statement in statements:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute(url, statement)


async def test_sidecar_needs_no_more_than_the_rights_of_the_writer(
    role_urls: dict[str, str], empty_postgres_url: str, redis_url: str
) -> None:
    three_days_ago = int((time.time() - 3 * 86_400) * 1000)
    async with run_sidecar(redis_url, role_urls["writer"]) as sidecar:
        writer = PairWriter(role_urls["writer"], examples_per_finding=3)
        await writer.write([make_record([difference()], at=three_days_ago), make_record([difference()])])
        await writer.close()
        await sidecar.traffic.UpdateTraffic(
            traffic_pb2.UpdateTrafficRequest(service="shop", new_share=0.1, actor="ada", reason="a test", force=True)
        )
        async with sidecar.sidecar.database.connection() as connection:

            async def is_dropped() -> bool:
                return await drop_days(connection, retention_days=1) == 1  # 0 while a job of the sidecar has the lock

            await eventually_async(is_dropped, description="the day is dropped")

    assert query_value(empty_postgres_url, "select count(*) from abreast.pair") == 1
    assert_refused(
        role_urls["writer"],
        "drop table abreast.pair",
        "create table abreast.other (n integer)",
        "create table public.other (n integer)",
        "delete from abreast.schema_version",
        "create role other",
    )


async def test_reader_reads_no_tokens_and_changes_nothing(role_urls: dict[str, str]) -> None:
    assert query_value(role_urls["reader"], "select count(*) from abreast.finding") == 0
    assert_refused(
        role_urls["reader"],
        "select from abreast.token",
        "select from abreast.webhook_receiver",
        "insert into abreast.endpoint (service, method, route) values ('shop', 'GET', '/')",
        "delete from abreast.finding",
        "select abreast.drop_day(current_date)",
    )


def test_migrate_names_a_role_that_does_not_exist(empty_postgres_url: str) -> None:
    result = CliRunner().invoke(abreast, ["migrate", "--postgres-url", empty_postgres_url, "--writer", "nobody_here"])

    assert result.exit_code != 0
    assert 'role "nobody_here" does not exist' in result.output
    assert query_value(empty_postgres_url, "select to_regclass('abreast.pair') is null")
