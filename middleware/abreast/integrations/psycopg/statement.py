"""What a statement is: whether it writes, and its shape, by which those of two versions are compared. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.effects import record

MAX_TEXT_CHARS = 16_384  # characters that are read
MAX_SHAPE_CHARS = 2000  # characters
TRANSACTION_CONTROL_WORDS = frozenset({"abort", "begin", "commit", "end", "rollback", "start"})
READ_WORDS = frozenset(
    [
        "close",
        "deallocate",
        "declare",
        "discard",
        "execute",
        "explain",
        "fetch",
        "load",
        "lock",
        "move",
        "prepare",
        "release",
        "reset",
        "savepoint",
        "select",
        "set",
        "show",
        "table",
        "values",
        "with",
    ]
)
WRITE_WORDS = frozenset(
    [
        "alter",
        "analyze",
        "call",
        "cluster",
        "comment",
        "copy",
        "create",
        "delete",
        "do",
        "drop",
        "grant",
        "import",
        "insert",
        "merge",
        "notify",
        "reassign",
        "refresh",
        "reindex",
        "revoke",
        "security",
        "truncate",
        "update",
        "vacuum",
    ]
)
TOKEN_PATTERN = re.compile(
    r"""
      (?P<space>\s+|--[^\n\r]*|/\*(?:(?!/\*).)*?\*/)  # a comment in a comment is left, and so not known
    | (?P<text>[bBeEnNxX]?'(?:[^'\\]|''|\\.)*'|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$)
    | (?P<name>"(?:[^"]|"")*")
    | (?P<holder>(?:%\((?P<by>[^)]*)\)[bst]|%[bst]|\$\d+)(?P<cast>::\w+(?:\ with(?:out)?\ time\ zone)?(?:\(\d+\))?(?:\[\])?)?)
    | (?P<number>\d+(?:\.\d+)?)
    | (?P<word>[^\W\d]\w*)
    | (?P<sign>.)
    """,
    re.VERBOSE | re.DOTALL,
)
NAMED = re.compile(r'(?:"[^"]*"|[\w$])+(?:\s*\.\s*(?:"[^"]*"|[\w$])+)*')
WRITE_PATTERN = re.compile(
    r"\b(?P<verb>insert\s+into|merge\s+into|delete\s+from|update|truncate(?:\s+table)?|copy)\s+(?:only\s+)?"
    r"(?P<table>[^\s(;]+)",
    re.IGNORECASE,
)
READ_PATTERN = re.compile(r"\bfrom (?:only )?(?P<table>[^\s(;,)]+)")
INSERT_PATTERN = re.compile(r"insert into \S+ \((?P<columns>[^()]*)\) values \((?P<holders>[?, ]*)\)")
PLAIN_NAME_PATTERN = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Statement:
    """`word` is its first, but for `with`: there it is what is done to a table. `table` is the first that is named."""

    keyword: str
    table: str
    shape: str
    is_write: bool
    is_transaction_control: bool  # it begins or ends a transaction
    is_known: bool
    placeholder_names: tuple[str, ...]  # of its placeholders, in order; empty where they have none
    columns: tuple[str, ...]  # of an insert of one row, one for each placeholder

    @property
    def label(self) -> str:
        return f"{self.keyword} {self.table}".rstrip()

    def name_values(self, params: Any) -> Any:
        """Bound values under the names of their columns, or else under their own."""
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
    is_nested_write = keyword in {"with", "explain", "prepare"} and write_match is not None
    if is_nested_write and write_match is not None and keyword == "with":
        keyword = write_match["verb"].split()[0].lower()
    insert_match = INSERT_PATTERN.match(shape)
    columns = _get_insert_columns(insert_match) if insert_match else ()
    return Statement(
        keyword=keyword,
        table=_get_table(write_match if is_nested_write or keyword in WRITE_WORDS else READ_PATTERN.search(shape)),
        shape=shape[:MAX_SHAPE_CHARS],
        is_write=is_nested_write or keyword in WRITE_WORDS,
        is_transaction_control=(keyword in TRANSACTION_CONTROL_WORDS and not is_rollback_to_savepoint)
        or is_prepare_transaction,
        is_known=is_rollback_to_savepoint or not shape or keyword in READ_WORDS or keyword in WRITE_WORDS,
        placeholder_names=names,
        columns=columns,
    )


def _normalise(text: str) -> tuple[str, tuple[str, ...]]:
    """In lower case, with one space between words, without comments, and with ? for each value."""
    parts: list[str] = []
    names: list[str] = []
    for match in TOKEN_PATTERN.finditer(text):
        kind, part = match.lastgroup, match.group()
        if match["space"] is not None:
            part = " "
        elif match["holder"] is not None:
            names += [match["by"]] if match["by"] is not None else []
            part = "?"
        elif match["text"] is not None or kind == "number":
            part = "?"
        elif match["name"] is not None:
            part = part[1:-1] if PLAIN_NAME_PATTERN.fullmatch(part[1:-1]) else part
        else:
            part = part.lower()
        if part != " " or (parts and parts[-1] != " "):
            parts.append(part)
    return re.sub(r" ?([(),;]) ?", _space_punctuation, "".join(parts)).strip(" ;"), tuple(names)


def _space_punctuation(match: re.Match[str]) -> str:
    return {"(": " (", ")": ") ", ",": ", ", ";": "; "}[match[1]]


def _get_table(match: re.Match[str] | None) -> str:
    return match["table"].strip('"') if match is not None else ""


def _get_insert_columns(match: re.Match[str]) -> tuple[str, ...]:
    columns = tuple(column.strip() for column in match["columns"].split(","))
    return columns if match["holders"].count("?") == len(columns) else ()


UNPARSED = Statement(
    "", "", "", is_write=False, is_transaction_control=False, is_known=True, placeholder_names=(), columns=()
)


MAX_PENDING_WRITES = 200  # of a transaction: as many as are recorded of a request
MAX_RECORDED_ROWS = 20  # of one executemany whose values are recorded


class PendingWrites:
    def __init__(self) -> None:
        self._writes: list[tuple[RequestContext, Statement, Any]] = []

    def add(self, sql_statement: Statement, payload: dict[str, Any]) -> None:
        context = CURRENT_CONTEXT.get()
        if context.is_captured and len(self._writes) < MAX_PENDING_WRITES:
            self._writes.append((context, sql_statement, payload))

    def savepoint(self) -> int:
        return len(self._writes)

    def rollback_to(self, savepoint: int = 0) -> None:
        """What came since was rolled back."""
        del self._writes[savepoint:]

    def commit(self) -> None:
        """It was committed, or would have been."""
        writes, self._writes = self._writes, []
        for context, sql_statement, payload in writes:
            token = CURRENT_CONTEXT.set(context)
            try:
                record(f"db.{sql_statement.label}".replace(" ", "."), payload)  # so that a finding names the table
            finally:
                CURRENT_CONTEXT.reset(token)


def payload_for_one(sql_statement: Statement, params: Any) -> dict[str, Any]:
    """`values` under the names of columns or placeholders, so that secrets among them are known by name."""
    values = sql_statement.name_values(params)
    return (
        {"statement": sql_statement.shape} if values is None else {"statement": sql_statement.shape, "values": values}
    )


def payload_for_many(sql_statement: Statement, params_seq: list[Any]) -> dict[str, Any]:
    rows = [sql_statement.name_values(row) for row in params_seq[:MAX_RECORDED_ROWS]]
    return {"statement": sql_statement.shape, "rows": len(params_seq), "values": rows}
