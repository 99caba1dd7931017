from __future__ import annotations

import asyncio
import re
from importlib import resources

import psycopg
import pytest

from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.store.migrate import Migration, migrate, migrations
from support_pairs import one, rows, sums_are_those_of_rows

pytestmark = pytest.mark.postgres

FIRST = Migration(1, "first", b"create table abreast.first (n integer)")
SECOND = Migration(2, "second", b"create table abreast.second (n integer)")


def test_migrations_have_no_gaps_and_speaking_names() -> None:
    folder = resources.files("abreast_sidecar.store") / "migrations"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".sql"))

    assert [migration.version for migration in migrations()] == list(range(1, len(names) + 1))
    assert all(re.fullmatch(r"\d{4}_[a-z_]+\.sql", name) for name in names)


async def test_a_new_database_gets_all_and_an_up_to_date_one_nothing(empty_postgres_url: str) -> None:
    first = await migrate(empty_postgres_url)
    applied = rows(empty_postgres_url, "select * from abreast.migration")
    again = await migrate(empty_postgres_url)

    assert first == again == len(migrations())
    assert rows(empty_postgres_url, "select * from abreast.migration") == applied


async def test_sidecars_that_start_at_once_apply_each_migration_once(empty_postgres_url: str) -> None:
    versions = await asyncio.gather(*(migrate(empty_postgres_url) for _ in range(8)))

    assert set(versions) == {len(migrations())}
    assert one(empty_postgres_url, "select count(*) from abreast.migration") == len(migrations())


async def test_only_what_is_missing_is_applied(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, [FIRST])
    await migrate(empty_postgres_url, [FIRST, SECOND])

    assert rows(empty_postgres_url, "select version, name from abreast.migration order by 1") == [
        (1, "first"),
        (2, "second"),
    ]


async def test_a_newer_database_is_refused_in_plain_words(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, [FIRST, SECOND])
    with pytest.raises(
        SchemaError, match="has schema version 2, this code knows 1: run the newer abreast"
    ) as caught:
        await migrate(empty_postgres_url, [FIRST])

    assert empty_postgres_url.split(":")[2].split("@", maxsplit=1)[0] not in str(caught.value)  # the password


async def test_a_changed_migration_is_refused(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, [FIRST])

    with pytest.raises(SchemaError, match=r"another 0001_first\.sql"):
        await migrate(empty_postgres_url, [Migration(1, "first", b"select 1")])


async def test_a_migration_that_fails_leaves_nothing_behind(empty_postgres_url: str) -> None:
    broken = Migration(2, "broken", b"create table abreast.half (n integer); select 1/0")
    with pytest.raises(LedgerError, match="division by zero"):
        await migrate(empty_postgres_url, [FIRST, broken])

    with psycopg.connect(empty_postgres_url) as connection:
        assert connection.execute("select to_regnamespace('abreast')").fetchone() == (None,)


async def test_postgres_that_is_away_is_one_clear_error() -> None:
    with pytest.raises(LedgerError, match="postgres can't be reached, check ABREAST_POSTGRES_URL"):
        await migrate("postgresql://postgres@127.0.0.1:1/postgres")


async def test_a_day_is_opened_once_however_many_ask(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url)

    async def open_day() -> None:
        async with await psycopg.AsyncConnection.connect(empty_postgres_url, autocommit=True) as connection:
            await connection.execute(
                "select abreast.open_day(date '2026-01-31' + n) from generate_series(0, 2) as n"
            )

    await asyncio.gather(*(open_day() for _ in range(6)))

    found = rows(
        empty_postgres_url,
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'abreast.pair'::regclass order by 1",
    )
    assert [name for (name,) in found] == [
        f"abreast.pair_{day}" for day in ("20260131", "20260201", "20260202")
    ]


async def test_what_an_old_ledger_holds_is_counted_as_if_it_had_always_been(empty_postgres_url: str) -> None:
    await migrate(empty_postgres_url, migrations()[:8])
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute(
            "insert into abreast.endpoint (service, method, route) values ('shop', 'GET', '/')"
        )
        connection.execute("select abreast.open_day('2026-01-31')")
        connection.execute(
            "insert into abreast.pair (day, id, at, endpoint_id, outcome, old_status, new_status, new_release, findings)"
            " select '2026-01-31', n, '2026-01-31T00:00:00Z'::timestamptz + n * interval '7 minutes', 1,"
            " (array['match', 'mismatch'])[1 + n % 2], 200, nullif(200 + n % 3 * 100, 400), 'v' || n % 2,"
            " case n % 2 when 1 then '{5, 3}'::bigint[] else '{}' end from generate_series(1, 200) as n"
        )
    await migrate(empty_postgres_url)

    sums_are_those_of_rows(empty_postgres_url)
    assert one(empty_postgres_url, "select sum(pairs)::int from abreast.hour") == 200


async def test_a_database_of_another_encoding_is_refused(empty_postgres_url: str) -> None:
    base, _, _ = empty_postgres_url.rpartition("/")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("drop database if exists latin")
        connection.execute("create database latin encoding 'LATIN1' locale 'C' template template0")

    with pytest.raises(SchemaError, match="has the encoding LATIN1: name one"):
        await migrate(f"{base}/latin")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("drop database latin")
