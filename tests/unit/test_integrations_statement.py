"""Parsing of SQL statements for the psycopg integration."""

from __future__ import annotations

import pytest

from abreast.integrations.psycopg.statement import parse_statement

SHAPE = "insert into orders (id, quantity) values (?, ?)"


@pytest.mark.parametrize(
    "text",
    [
        "INSERT INTO orders (id, quantity) VALUES (%(id)s, %(quantity)s)",
        "insert into orders(id,quantity)\n  values ( %s,%s ) -- comment",
        'INSERT INTO "orders" (id, quantity) VALUES (%(id)s::UUID, %(n)s::INTEGER)',
        "insert into orders (id, quantity) values ('a', 7);",
        "/* comment */ insert into orders (id, quantity) values ($1, $2)",
    ],
)
def test_parse_statement_returns_one_shape_for_each_notation(text: str) -> None:
    assert parse_statement(text).shape == SHAPE
    assert (parse_statement(text).keyword, parse_statement(text).table) == ("insert", "orders")


@pytest.mark.parametrize(
    ("text", "keyword", "table"),
    [
        ("update app.orders set quantity = 1", "update", "app.orders"),
        ("delete from only orders", "delete", "orders"),
        ("with deleted as (delete from orders returning *) select * from deleted", "delete", "orders"),
        ("merge into orders using x on true when matched then delete", "merge", "orders"),
        ("copy orders (id) from stdin", "copy", "orders"),
        ("explain analyze insert into orders values (1)", "explain", "orders"),
        ("create table orders (id int)", "create", ""),
        ("notify orders", "notify", ""),
    ],
)
def test_parse_statement_recognizes_writes_and_their_table(text: str, keyword: str, table: str) -> None:
    statement = parse_statement(text)

    assert (statement.is_write, statement.keyword, statement.table) == (True, keyword, table)


@pytest.mark.parametrize(
    "text",
    ["select 'insert into orders'", "(select 1)", "with a as (select 1) select * from a", "show all", "rollback to x"],
)
def test_parse_statement_recognizes_reads(text: str) -> None:
    statement = parse_statement(text)

    assert (statement.is_write, statement.is_transaction_control, statement.is_known) == (False, False, True)


def test_name_values_uses_the_names_of_columns() -> None:
    by_position = parse_statement("insert into orders (id, quantity) values (%s, %s)")
    by_name = parse_statement("insert into orders (id, quantity) values (%(a)s, %(b)s)")

    assert by_position.name_values((1, 2)) == by_name.name_values({"a": 1, "b": 2}) == {"id": 1, "quantity": 2}
    assert parse_statement("delete from orders where id = %s").name_values((1,)) == [1]
