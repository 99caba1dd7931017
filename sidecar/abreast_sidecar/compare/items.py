"""Parsers of bodies made of items: newline-delimited JSON, server-sent events, forms, multipart, lines."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from abreast.protocol.capture import digest
from abreast_sidecar.compare.content import MediaType, decode_text, parse_media_type, sniff_format
from abreast_sidecar.compare.headers import canonical_media_type
from abreast_sidecar.compare.values import NotJsonError, parse

MAX_FORM_FIELDS = 10_000
MAX_PARTS = 1000
RECORD_SEPARATOR = b"\x1e"


class NotItemsError(ValueError):
    """A body is not in the format of its items."""


def split_lines(text: str) -> list[str]:
    """Split at line ends of Unix or Windows. A text that ends with a line end has an empty last line."""
    return text.replace("\r\n", "\n").split("\n")


def parse_ndjson(body: bytes) -> list[Any]:
    """Parse each line that is not empty. Raise NotJsonError."""
    return [parse(line) for raw in body.split(b"\n") if (line := raw.strip(RECORD_SEPARATOR + b" \t\r"))]


def parse_sse(text: str) -> list[dict[str, Any]]:
    """Parse server-sent events as the HTML standard does, and data that is JSON."""
    event_list: list[dict[str, Any]] = []
    event: dict[str, Any] = {}
    data: list[str] = []
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""]:
        if not line:
            if data:
                event["data"] = _parse_event_data("\n".join(data))
            if event:
                event_list.append(event)
            event, data = {}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name:  # lines that start with a colon are comments
            event[name] = value
    return event_list


def _parse_event_data(text: str) -> Any:
    if text[:1] not in {"{", "["}:
        return text
    try:
        return parse(text.encode("utf-8", "surrogatepass"))
    except NotJsonError:
        return text


def parse_form(text: str) -> dict[str, Any]:
    """Parse fields by name; a repeated field is an array. Raise NotItemsError for too many fields."""
    try:
        pairs = parse_qsl(text.strip(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
    except ValueError as error:
        raise NotItemsError(str(error)) from error
    return _group_by_name(pairs)


def parse_multipart(body: bytes, media_type: MediaType) -> dict[str, Any] | list[Any]:
    """Parse parts by name, or as a list if a part has no name. Ignore preamble and epilogue.

    Raise NotItemsError for a body that is truncated or has no boundary.
    """
    boundary = media_type.get_parameter("boundary").encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2) if boundary else []
    if len(pieces) < 2 or len(pieces) > MAX_PARTS + 1 or not pieces[-1].startswith(b"--"):
        raise NotItemsError("the parts have no boundary or no end")
    parts = [_parse_part(piece) for piece in pieces[1:-1]]
    if all(name for name, _ in parts):
        return _group_by_name(parts)
    return [value for _, value in parts]


def _parse_part(piece: bytes) -> tuple[str, Any]:
    padding, line_end, remainder = piece.partition(b"\r\n")
    if padding.strip(b" \t") or not line_end:
        raise NotItemsError("unexpected text on a boundary line")
    head, _, content = (line_end + remainder).partition(b"\r\n\r\n")
    headers = _parse_headers(head)
    disposition, media_type = (
        parse_media_type(headers.pop("content-disposition", "")),
        parse_media_type(headers.pop("content-type", "")),
    )
    headers.pop("content-length", None)  # the content is compared
    part: dict[str, Any] = {}
    if media_type.essence:
        part["type"] = canonical_media_type(media_type)
    if disposition.essence not in {"", "form-data"}:
        part["disposition"] = disposition.essence
    part |= {name: value for name, value in disposition.parameters if name != "name"}
    part |= headers
    part["content"] = _parse_content(content, media_type)
    return disposition.get_parameter("name"), part if len(part) > 1 else part["content"]


def _parse_headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if line:
            previous = headers.get(name.strip().lower())
            headers[name.strip().lower()] = value.strip() if previous is None else f"{previous}, {value.strip()}"
    return headers


def _parse_content(content: bytes, media_type: MediaType) -> Any:
    if media_type.format == "json" or (not media_type.essence and sniff_format(content) == "json"):
        try:
            return parse(content)
        except NotJsonError:
            pass
    text = decode_text(content, media_type.get_parameter("charset")) if media_type.format != "bytes" else None
    return (
        summarise_content(content) if text is None or (media_type.format == "unknown" and media_type.essence) else text
    )


def summarise_content(content: bytes) -> dict[str, Any]:
    return {"length": len(content), "digest": digest(content)}


def _group_by_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values_by_name: dict[str, list[Any]] = {}
    for name, value in pairs:
        values_by_name.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in values_by_name.items()}
