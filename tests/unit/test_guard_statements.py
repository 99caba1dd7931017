"""What the database's guards make of a statement, and that both kinds of psycopg's connections are guarded alike."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from abreast.integrations.psycopg import connection as psycopg_sync
from abreast.integrations.psycopg import connection_async as psycopg_async
from abreast.integrations.psycopg.statement import parse_statement

SAME = "insert into orders (id, quantity) values (?, ?)"
TWINS = {
    "AsyncIterator": "Iterator",
    "asynccontextmanager": "contextmanager",
    "async with ": "with ",
    "async for row in super().stream(query, params, **kwargs):\n                yield row": "yield from super().stream(query, params, **kwargs)",
    "async for ": "for ",
    "async def ": "def ",
    "await ": "",
    "Async": "",
}


@pytest.mark.parametrize(
    "text",
    [
        "INSERT INTO orders (id, quantity) VALUES (%(id)s, %(quantity)s)",
        "insert into orders(id,quantity)\n  values ( %s,%s ) -- by hand",
        'INSERT INTO "orders" (id, quantity) VALUES (%(id)s::UUID, %(n)s::INTEGER)',
        "insert into orders (id, quantity) values ('a', 7);",
        "/* who */ insert into orders (id, quantity) values ($1, $2)",
    ],
)
def test_one_statement_has_one_shape_however_it_is_written(text: str) -> None:
    assert parse_statement(text).shape == SAME
    assert (parse_statement(text).keyword, parse_statement(text).table) == ("insert", "orders")


@pytest.mark.parametrize(
    ("text", "word", "table"),
    [
        ("update app.orders set quantity = 1", "update", "app.orders"),
        ("delete from only orders", "delete", "orders"),
        ("with gone as (delete from orders returning *) select * from gone", "delete", "orders"),
        ("merge into orders using x on true when matched then delete", "merge", "orders"),
        ("copy orders (id) from stdin", "copy", "orders"),
        ("explain analyze insert into orders values (1)", "explain", "orders"),
        ("create table orders (id int)", "create", ""),
        ("notify orders", "notify", ""),
    ],
)
def test_what_writes_is_known_by_its_verb_and_table(text: str, word: str, table: str) -> None:
    known = parse_statement(text)

    assert (known.is_write, known.keyword, known.table) == (True, word, table)


@pytest.mark.parametrize(
    "text",
    ["select 'insert into orders'", "(select 1)", "with a as (select 1) select * from a", "show all", "rollback to x"],
)
def test_what_reads_is_no_effect(text: str) -> None:
    known = parse_statement(text)

    assert (known.is_write, known.is_transaction_control, known.is_known) == (False, False, True)


def test_values_are_under_the_names_of_their_columns() -> None:
    by_place = parse_statement("insert into orders (id, quantity) values (%s, %s)")
    by_name = parse_statement("insert into orders (id, quantity) values (%(a)s, %(b)s)")

    assert by_place.name_values((1, 2)) == by_name.name_values({"a": 1, "b": 2}) == {"id": 1, "quantity": 2}
    assert parse_statement("delete from orders where id = %s").name_values((1,)) == [1]


def test_both_kinds_of_connections_are_guarded_alike() -> None:
    text = Path(psycopg_async.__file__).read_text()
    for one, other in TWINS.items():
        text = text.replace(one, other)

    assert bodies(text) == bodies(Path(psycopg_sync.__file__).read_text())


def bodies(text: str) -> list[str]:
    tree = ast.parse(text)
    parts = tree.body[1:]  # without the docstring
    return [ast.unparse(part) for part in parts if not isinstance(part, ast.Import | ast.ImportFrom)]
