"""Named queries of the ledger."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from abreast_sidecar.store.database import load_statement, parse_queries, statements

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"[a-z][a-z_]*")
CALLS = {"statement": 0, "rows": 0, "one": 0, "execute": 0, "rows_of": 1, "one_of": 1}  # index of the name


def trees(folder: str) -> Iterator[ast.AST]:
    for file in (ROOT / folder).rglob("*.py"):
        if "statement" in (text := file.read_text()) or "database" in text:
            yield ast.parse(text)


def literals(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            arguments = node.args[CALLS[function] :][:1] if function in CALLS else []
            if arguments and isinstance(arguments[0], ast.Constant) and NAME.fullmatch(str(arguments[0].value)):
                yield str(arguments[0].value)


def test_queries_are_all_used() -> None:
    used = {text for tree in trees("sidecar") for text in literals(tree)}

    assert set(statements()) - used == set()


@pytest.mark.parametrize("folder", ["sidecar", "bench"])
def test_queries_that_code_names_exist(folder: str) -> None:
    names = {name for tree in trees(folder) for name in called(tree)}

    assert names - set(statements()) == set()


def test_queries_begin_with_their_name_and_one_load_statement() -> None:
    folder = ROOT / "sidecar" / "abreast_sidecar" / "store" / "queries"
    for file in folder.glob("*.sql"):
        assert file.read_text().startswith("-- name: "), file.name
    assert [name for name, query in statements().items() if query.endswith(b";")] == []


def test_statement_raises_for_an_unknown_name() -> None:
    with pytest.raises(KeyError, match="no_such_query"):
        load_statement("no_such_query")


def test_parse_queries_keeps_comments_of_a_query() -> None:
    text = b"-- name: first\n-- Reason.\nselect 1\n\n-- name: second\nselect 2\n"

    assert parse_queries({"a.sql": text}) == {"first": b"-- Reason.\nselect 1", "second": b"select 2"}


def test_parse_queries_refuses_a_duplicate_name() -> None:
    with pytest.raises(ValueError, match=r"b\.sql: another query is named same"):
        parse_queries({"b.sql": b"-- name: same\nselect 2\n", "a.sql": b"-- name: same\nselect 1\n"})
