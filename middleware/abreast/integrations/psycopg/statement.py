"""Parse SQL statements, and record the writes of a transaction when it commits.

The shape of a statement is what both versions have in common: lower case, no comments, `?` for each value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from psycopg import sql

from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.effects import record

MAX_TEXT_CHARS = 16_384  # longest text that is parsed
MAX_SHAPE_CHARS = 2000
MAX_PENDING_WRITES = 200  # per transaction, as many as the effects of a request
MAX_RECORDED_ROWS = 20  # per executemany
# fmt: off
TRANSACTION_CONTROL_WORDS = frozenset({"abort", "begin", "commit", "end", "rollback", "start"})
READ_WORDS = frozenset({
    "close", "deallocate", "declare", "discard", "execute", "explain", "fetch", "load", "lock", "move", "prepare",
    "release", "reset", "savepoint", "select", "set", "show", "table", "values", "with",
})
WRITE_WORDS = frozenset({
    "alter", "analyze", "call", "cluster", "comment", "copy", "create", "delete", "do", "drop", "grant", "import",
    "insert", "merge", "notify", "reassign", "refresh", "reindex", "revoke", "security", "truncate", "update", "vacuum",
})
# fmt: on
TOKEN_PATTERN = re.compile(
    r"""
      (?P<space>\s+|--[^\n\r]*|/\*(?:(?!/\*).)*?\*/)  # a nested comment stays, so the keyword is unknown
    | (?P<text>[bBeEnNxX]?'(?:[^'\\]|''|\\.)*'|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$)
    | (?P<name>"(?:[^"]|"")*")
    | (?P<placeholder>(?:%\((?P<parameter>[^)]*)\)[bst]|%[bst]|\$\d+)(?:::\w+(?:\ with(?:out)?\ time\ zone)?(?:\(\d+\))?(?:\[\])?)?)
    | (?P<number>\d+(?:\.\d+)?)
    | [^\W\d]\w*
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
WRITE_PATTERN = re.compile(
    r"\b(?P<verb>insert\s+into|merge\s+into|delete\s+from|update|truncate(?:\s+table)?|copy)\s+(?:only\s+)?"
    r"(?P<table>[^\s(;]+)",
    re.IGNORECASE,
)
READ_PATTERN = re.compile(r"\bfrom (?:only )?(?P<table>[^\s(;,)]+)")
INSERT_PATTERN = re.compile(r"insert into \S+ \((?P<columns>[^()]*)\) values \((?P<placeholders>[?, ]*)\)")
PLAIN_NAME_PATTERN = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Statement:
    """A parsed statement.

    `keyword` is the first word, or for `with` the verb of the nested write. `table` is the first table that is written,
    or else read. `placeholder_names` are in order, and empty if placeholders have no names. `columns` are those of an
    `insert` of one row, one per placeholder.
    """

    keyword: str
    table: str
    shape: str
    is_write: bool = False
    is_transaction_control: bool = False  # begins or ends a transaction
    is_known: bool = True
    placeholder_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.keyword} {self.table}".rstrip()

    def name_values(self, params: Any) -> Any:
        """Return the bound values by column name, or else by parameter name or as a list."""
        if params is None:
            return None
        if isinstance(params, Mapping):
            if self.columns and len(self.placeholder_names) == len(self.columns):
                return {
                    column: params.get(name) for column, name in zip(self.columns, self.placeholder_names, strict=True)
                }
            return dict(params)
        if not isinstance(params, Sequence) or isinstance(params, str | bytes):
            return params
        if len(params) == len(self.columns):
            return dict(zip(self.columns, params, strict=True))
        return list(params)


UNPARSED = Statement("", "", "")


def parse_statement(text: str) -> Statement:
    return _parse_statement(text[:MAX_TEXT_CHARS])


@lru_cache(maxsize=512)
def _parse_statement(text: str) -> Statement:
    shape, names = _normalise(text)
    head, _, remainder = shape.lstrip("(; ").partition(" ")
    keyword = re.split(r"[^a-z]", head, maxsplit=1)[0]
    is_rollback_to_savepoint = keyword == "rollback" and re.match(r"(?:work |transaction )?to\b", remainder) is not None
    is_prepare_transaction = keyword == "prepare" and remainder.startswith("transaction")
    write_match = WRITE_PATTERN.search(shape)
    is_write = keyword in WRITE_WORDS or (keyword in {"with", "explain", "prepare"} and write_match is not None)
    if write_match is not None and keyword == "with":
        keyword = write_match["verb"].split()[0].lower()
    insert_match = INSERT_PATTERN.match(shape)
    columns = tuple(name.strip() for name in insert_match["columns"].split(",")) if insert_match else ()
    if insert_match and insert_match["placeholders"].count("?") != len(columns):
        columns = ()
    table_match = write_match if is_write else READ_PATTERN.search(shape)
    return Statement(
        keyword=keyword,
        table=table_match["table"].strip('"') if table_match is not None else "",
        shape=shape[:MAX_SHAPE_CHARS],
        is_write=is_write,
        is_transaction_control=(keyword in TRANSACTION_CONTROL_WORDS and not is_rollback_to_savepoint)
        or is_prepare_transaction,
        is_known=is_rollback_to_savepoint or not shape or keyword in READ_WORDS or keyword in WRITE_WORDS,
        placeholder_names=names,
        columns=columns,
    )


def _normalise(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the shape of a statement and the names of its placeholders."""
    parts: list[str] = []
    names: list[str] = []
    for match in TOKEN_PATTERN.finditer(text):
        part = match.group()
        if match["space"] is not None:
            part = " "
        elif match["placeholder"] is not None:
            names += [match["parameter"]] if match["parameter"] is not None else []
            part = "?"
        elif match["text"] is not None or match["number"] is not None:
            part = "?"
        elif match["name"] is not None:
            part = part[1:-1] if PLAIN_NAME_PATTERN.fullmatch(part[1:-1]) else part
        else:
            part = part.lower()
        if part != " " or (parts and parts[-1] != " "):
            parts.append(part)
    spacing = {"(": " (", ")": ") ", ",": ", ", ";": "; "}
    shape = re.sub(r" ?([(),;]) ?", lambda match: spacing[match[1]], "".join(parts))
    return shape.strip(" ;"), tuple(names)


class PendingWrites:
    """The writes of one connection that are recorded when their transaction commits."""

    def __init__(self) -> None:
        self._writes: list[tuple[RequestContext, Statement, Any]] = []

    def add(self, sql_statement: Statement, payload: dict[str, Any]) -> None:
        context = CURRENT_CONTEXT.get()
        if context.is_captured and len(self._writes) < MAX_PENDING_WRITES:
            self._writes.append((context, sql_statement, payload))

    def savepoint(self) -> int:
        return len(self._writes)

    def rollback_to(self, savepoint: int = 0) -> None:
        """Drop the writes since the savepoint."""
        del self._writes[savepoint:]

    def commit(self) -> None:
        """Record all writes as effects of the requests that made them."""
        writes, self._writes = self._writes, []
        for context, sql_statement, payload in writes:
            token = CURRENT_CONTEXT.set(context)
            try:
                record(f"db.{sql_statement.label}".replace(" ", "."), payload)  # so that a finding names the table
            finally:
                CURRENT_CONTEXT.reset(token)


def describe_write(sql_statement: Statement, params: Any) -> dict[str, Any] | None:
    """Return the payload of a write, or None for a read. Values have names, by which secrets are recognized."""
    if not sql_statement.is_write:
        return None
    values = sql_statement.name_values(params)
    return {"statement": sql_statement.shape} | ({} if values is None else {"values": values})


def describe_writes(sql_statement: Statement, params_seq: list[Any]) -> dict[str, Any] | None:
    """Return the payload of an executemany, or None for a read."""
    if not sql_statement.is_write:
        return None
    rows = [sql_statement.name_values(params) for params in params_seq[:MAX_RECORDED_ROWS]]
    return {"statement": sql_statement.shape, "rows": len(params_seq), "values": rows}


def get_query_text(query: Any, connection: Any) -> str:
    """Return the text of any query that psycopg accepts."""
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    if isinstance(query, sql.Composable):
        return query.as_string(connection)
    return "?".join(getattr(query, "strings", ("(unknown)",)))  # a template string of Python 3.14
