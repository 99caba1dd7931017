"""Answers from files: a body, or a whole HTTP response as `curl -i` prints it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from abreast.capture import Answer, Body, Headers
from abreast_sidecar.compare.value import NotJsonError, parse
from abreast_sidecar.errors import ArgumentError

JSON = "application/json"
STDIN = "-"
_STATUS_LINE = re.compile(rb"HTTP/[0-9.]+ ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,100}\r?\n")


def read(name: str) -> bytes:
    """`-` is stdin. Raise ArgumentError for what can't be read."""
    try:
        return sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise ArgumentError(f"{name} can't be read: {error.strerror or error}") from error


def body_answer(data: bytes, name: str, kind: str) -> Answer:
    """Raise ArgumentError where it is to be JSON and is not. An empty body is that of no answer."""
    if kind == JSON and data:
        _check_json(data, name)
    return _answer(200, (("content-type", kind),) if kind else (), data)


def _check_json(data: bytes, name: str) -> None:
    try:
        parse(data.removeprefix(b"\xef\xbb\xbf"))
    except NotJsonError as error:
        raise ArgumentError(
            f"{name} is not valid JSON ({error}); say what it is with --type, or --http"
        ) from error


def http_answer(data: bytes, name: str) -> Answer:
    """The last response in the file: curl prints 100 Continue, a proxy's answer and redirects before it.

    Raise ArgumentError.
    """
    found = _STATUS_LINE.match(data)
    if found is None:
        raise ArgumentError(
            f"{name} must begin with a status line such as HTTP/1.1 200 OK, as curl -i prints it"
        )
    head, blank, rest = _parted(data[found.end() :])
    while following := _STATUS_LINE.match(rest):
        found = following
        head, blank, rest = _parted(rest[found.end() :])
    headers = tuple(_header(line, name) for line in head.splitlines() if line.strip())
    if not blank and rest:
        raise ArgumentError(f"{name} has no empty line between headers and body")
    return _answer(int(found[1]), headers, _body(rest, headers))


def _parted(data: bytes) -> tuple[bytes, bytes, bytes]:
    if data.startswith((b"\r\n", b"\n")):
        return b"", b"\n", data[2 if data.startswith(b"\r") else 1 :]
    places = [(place, blank) for blank in (b"\r\n\r\n", b"\n\n") if (place := data.find(blank)) >= 0]
    if not places:
        return data, b"", b""
    place, blank = min(places)
    return data[:place], blank, data[place + len(blank) :]


def _header(line: bytes, name: str) -> tuple[str, str]:
    key, colon, value = line.decode("latin-1").partition(":")
    if not colon or not key.strip():
        raise ArgumentError(f"{name} has a header line without a colon: {line[:60]!r}")
    return key.strip().lower(), value.strip()


def _body(data: bytes, headers: Headers) -> bytes:
    known = dict(headers)
    if "chunked" in known.get("transfer-encoding", "").lower():
        return _unchunked(data)
    length = known.get("content-length", "")
    if (
        length.isdecimal()
        and data.endswith(b"\n")
        and len(data.rstrip(b"\r\n")) <= int(length[:18]) < len(data)
    ):
        return data[: int(length[:18])]  # an editor's last newline
    return data


def _unchunked(data: bytes) -> bytes:
    """The body without its chunks; as it is where it has none, as in what curl prints."""
    pieces: list[bytes] = []
    position = 0
    while found := _CHUNK.match(data, position):
        size = int(found[1], 16)
        if size == 0:
            return b"".join(pieces)
        end = found.end() + size
        if data[end : end + 2] != b"\r\n" and data[end : end + 1] != b"\n":
            return data
        pieces.append(data[found.end() : end])
        position = end + (2 if data[end : end + 1] == b"\r" else 1)
    return data


def _answer(status: int, headers: Headers, data: bytes) -> Answer:
    return Answer(status, headers, Body(held=data, length=len(data)))
