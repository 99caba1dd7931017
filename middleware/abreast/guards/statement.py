"""What a statement is: whether it writes, and its shape, by which those of two versions are compared. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MOST_TEXT = 16_384  # characters that are read
MOST_SHAPE = 2000  # characters
CONTROL = frozenset({"abort", "begin", "commit", "end", "rollback", "start"})
READS = frozenset(
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
WRITES = frozenset(
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
TOKEN = re.compile(
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
VERB = re.compile(
    r"\b(?P<verb>insert\s+into|merge\s+into|delete\s+from|update|truncate(?:\s+table)?|copy)\s+(?:only\s+)?"
    r"(?P<table>[^\s(;]+)",
    re.IGNORECASE,
)
READ = re.compile(r"\bfrom (?:only )?(?P<table>[^\s(;,)]+)")
INSERT = re.compile(r"insert into \S+ \((?P<columns>[^()]*)\) values \((?P<holders>[?, ]*)\)")
PLAIN = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Statement:
    """`word` is its first, but for `with`: there it is what is done to a table. `table` is the first that is named."""

    word: str
    table: str
    shape: str
    writes: bool
    control: bool  # it begins or ends a transaction
    known: bool
    names: tuple[str, ...]  # of its placeholders, in order; empty where they have none
    columns: tuple[str, ...]  # of an insert of one row, one for each placeholder

    @property
    def said(self) -> str:
        return f"{self.word} {self.table}".rstrip()

    def values(self, given: Any) -> Any:
        """Bound values under the names of their columns, or else under their own."""
        if given is None:
            return None
        if isinstance(given, Mapping):
            if self.columns and len(self.names) == len(self.columns):
                return {
                    column: given.get(name) for column, name in zip(self.columns, self.names, strict=True)
                }
            return dict(given)
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            return given
        if len(given) == len(self.columns):
            return dict(zip(self.columns, given, strict=True))
        return list(given)


def statement(text: str) -> Statement:
    return _statement(text[:MOST_TEXT])


@lru_cache(maxsize=512)
def _statement(text: str) -> Statement:
    shape, names = _shape(text)
    first, _, rest = shape.lstrip("(; ").partition(" ")
    word = re.split(r"[^a-z]", first, maxsplit=1)[0]
    to_savepoint = word == "rollback" and re.match(r"(?:work |transaction )?to\b", rest) is not None
    prepared = word == "prepare" and rest.startswith("transaction")
    doing = VERB.search(shape)
    hidden = word in {"with", "explain", "prepare"} and doing is not None
    if hidden and doing is not None and word == "with":
        word = doing["verb"].split()[0].lower()
    inserted = INSERT.match(shape)
    columns = _columns(inserted) if inserted else ()
    return Statement(
        word=word,
        table=_table(doing if hidden or word in WRITES else READ.search(shape)),
        shape=shape[:MOST_SHAPE],
        writes=hidden or word in WRITES,
        control=(word in CONTROL and not to_savepoint) or prepared,
        known=to_savepoint or not shape or word in READS or word in WRITES,
        names=names,
        columns=columns,
    )


def _shape(text: str) -> tuple[str, tuple[str, ...]]:
    """In lower case, with one space between words, without comments, and with ? for each value."""
    parts: list[str] = []
    names: list[str] = []
    for found in TOKEN.finditer(text):
        kind, part = found.lastgroup, found.group()
        if found["space"] is not None:
            part = " "
        elif found["holder"] is not None:
            names += [found["by"]] if found["by"] is not None else []
            part = "?"
        elif found["text"] is not None or kind == "number":
            part = "?"
        elif found["name"] is not None:
            part = part[1:-1] if PLAIN.fullmatch(part[1:-1]) else part
        else:
            part = part.lower()
        if part != " " or (parts and parts[-1] != " "):
            parts.append(part)
    return re.sub(r" ?([(),;]) ?", _spaced, "".join(parts)).strip(" ;"), tuple(names)


def _spaced(found: re.Match[str]) -> str:
    return {"(": " (", ")": ") ", ",": ", ", ";": "; "}[found[1]]


def _table(found: re.Match[str] | None) -> str:
    return found["table"].strip('"') if found is not None else ""


def _columns(inserted: re.Match[str]) -> tuple[str, ...]:
    columns = tuple(column.strip() for column in inserted["columns"].split(","))
    return columns if inserted["holders"].count("?") == len(columns) else ()


UNREAD = Statement("", "", "", writes=False, control=False, known=True, names=(), columns=())
