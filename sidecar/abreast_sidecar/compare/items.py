"""Bodies made of items, as documents: newline-delimited JSON, server-sent events, forms, multipart, lines."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from abreast.capture import digest
from abreast_sidecar.compare.meaning import said
from abreast_sidecar.compare.media import Media, media, sniffed
from abreast_sidecar.compare.media import text as text_of
from abreast_sidecar.compare.value import NotJsonError, parse

MAX_FIELDS = 10_000  # of a form
MAX_PARTS = 1000  # of a multipart body
RECORD_SEPARATOR = b"\x1e"


class NotItemsError(ValueError):
    pass


def lines(text: str) -> list[str]:
    """The text's lines; how they end makes no difference, whether the last one ends does."""
    return text.replace("\r\n", "\n").split("\n")


def ndjson(body: bytes) -> list[Any]:
    """Raise NotJsonError where a line is no JSON."""
    return [parse(line) for raw in body.split(b"\n") if (line := raw.strip(RECORD_SEPARATOR + b" \t\r"))]


def events(text: str) -> list[dict[str, Any]]:
    """Server-sent events, by the WHATWG's rules; data that is JSON is read."""
    found: list[dict[str, Any]] = []
    event: dict[str, Any] = {}
    data: list[str] = []
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""]:
        if not line:
            if data:
                event["data"] = _value("\n".join(data))
            if event:
                found.append(event)
            event, data = {}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name:  # a line that begins with a colon is a comment, sent to keep the connection
            event[name] = value
    return found


def _value(text: str) -> Any:
    if text[:1] not in {"{", "["}:
        return text
    try:
        return parse(text.encode("utf-8", "surrogatepass"))
    except NotJsonError:
        return text


def form(text: str) -> dict[str, Any]:
    """Fields in any order; a field that comes several times is an array. Raise NotItemsError for too many."""
    try:
        pairs = parse_qsl(text.strip(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise NotItemsError(str(error)) from error
    return _grouped(pairs)


def multipart(body: bytes, kind: Media) -> dict[str, Any] | list[Any]:
    """Parts by their names; in order where they have none. What stands before and after them means nothing.

    Raise NotItemsError for what is cut or has no boundary.
    """
    boundary = kind.parameter("boundary").encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2) if boundary else []
    if len(pieces) < 2 or len(pieces) > MAX_PARTS + 1 or not pieces[-1].startswith(b"--"):
        raise NotItemsError("the parts have no boundary, or no end")
    parts = [_part(piece) for piece in pieces[1:-1]]
    if all(name for name, _ in parts):
        return _grouped(parts)
    return [value for _, value in parts]


def _part(piece: bytes) -> tuple[str, Any]:
    padding, begins, rest = piece.partition(b"\r\n")
    if padding.strip(b" \t") or not begins:
        raise NotItemsError("a boundary has more in its line")
    head, _, content = (begins + rest).partition(b"\r\n\r\n")
    headers = _headers(head)
    disposition, kind = media(headers.pop("content-disposition", "")), media(headers.pop("content-type", ""))
    headers.pop("content-length", None)  # said again, and better, by the content
    made: dict[str, Any] = {}
    if kind.essence:
        made["type"] = said(kind)
    if disposition.essence not in {"", "form-data"}:
        made["disposition"] = disposition.essence
    made |= {name: value for name, value in disposition.parameters if name != "name"}
    made |= headers
    made["content"] = _content(content, kind)
    return disposition.parameter("name"), made if len(made) > 1 else made["content"]


def _headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if line:
            known = headers.get(name.strip().lower())
            headers[name.strip().lower()] = value.strip() if known is None else f"{known}, {value.strip()}"
    return headers


def _content(content: bytes, kind: Media) -> Any:
    if kind.format == "json" or (not kind.essence and sniffed(content) == "json"):
        try:
            return parse(content)
        except NotJsonError:
            pass
    plain = text_of(content, kind.parameter("charset")) if kind.format != "bytes" else None
    return digest_of(content) if plain is None or (kind.format == "unknown" and kind.essence) else plain


def digest_of(content: bytes) -> dict[str, Any]:
    return {"length": len(content), "digest": digest(content)}


def _grouped(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
