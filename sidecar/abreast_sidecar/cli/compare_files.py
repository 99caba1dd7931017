"""Answers from files: a body, or a whole HTTP response as `curl -i` prints it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from abreast.capture import Answer, Body, Headers
from abreast_sidecar.compare.value import NotJsonError, parse
from abreast_sidecar.errors import ArgumentError

JSON_MEDIA_TYPE = "application/json"
STDIN_NAME = "-"
_STATUS_LINE_PATTERN = re.compile(rb"HTTP/[0-9.]+ ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
_CHUNK_PATTERN = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,100}\r?\n")


def read_file(name: str) -> bytes:
    """`-` is stdin. Raise ArgumentError for what can't be read."""
    try:
        return sys.stdin.buffer.read() if name == STDIN_NAME else Path(name).read_bytes()
    except OSError as error:
        raise ArgumentError(f"{name} can't be read: {error.strerror or error}") from error


def parse_body_file(data: bytes, name: str, kind: str) -> Answer:
    """Raise ArgumentError where it is to be JSON and is not. An empty body is that of no answer."""
    if kind == JSON_MEDIA_TYPE and data:
        _check_json(data, name)
    return _build_answer(200, (("content-type", kind),) if kind else (), data)


def _check_json(data: bytes, name: str) -> None:
    try:
        parse(data.removeprefix(b"\xef\xbb\xbf"))
    except NotJsonError as error:
        raise ArgumentError(
            f"{name} is not valid JSON ({error}); say what it is with --type, or --http"
        ) from error


def parse_http_file(data: bytes, name: str) -> Answer:
    """The last response in the file: curl prints 100 Continue, a proxy's answer and redirects before it.

    Raise ArgumentError.
    """
    status_line = _STATUS_LINE_PATTERN.match(data)
    if status_line is None:
        raise ArgumentError(
            f"{name} must begin with a status line such as HTTP/1.1 200 OK, as curl -i prints it"
        )
    head, blank, remainder = _split_head(data[status_line.end() :])
    while next_status_line := _STATUS_LINE_PATTERN.match(remainder):
        status_line = next_status_line
        head, blank, remainder = _split_head(remainder[status_line.end() :])
    headers = tuple(_parse_header_line(line, name) for line in head.splitlines() if line.strip())
    if not blank and remainder:
        raise ArgumentError(f"{name} has no empty line between headers and body")
    return _build_answer(int(status_line[1]), headers, _decode_file_body(remainder, headers))


def _split_head(data: bytes) -> tuple[bytes, bytes, bytes]:
    if data.startswith((b"\r\n", b"\n")):
        return b"", b"\n", data[2 if data.startswith(b"\r") else 1 :]
    separators = [
        (position, blank) for blank in (b"\r\n\r\n", b"\n\n") if (position := data.find(blank)) >= 0
    ]
    if not separators:
        return data, b"", b""
    position, blank = min(separators)
    return data[:position], blank, data[position + len(blank) :]


def _parse_header_line(line: bytes, name: str) -> tuple[str, str]:
    key, colon, value = line.decode("latin-1").partition(":")
    if not colon or not key.strip():
        raise ArgumentError(f"{name} has a header line without a colon: {line[:60]!r}")
    return key.strip().lower(), value.strip()


def _decode_file_body(data: bytes, headers: Headers) -> bytes:
    header_values = dict(headers)
    if "chunked" in header_values.get("transfer-encoding", "").lower():
        return _decode_chunks(data)
    length = header_values.get("content-length", "")
    if (
        length.isdecimal()
        and data.endswith(b"\n")
        and len(data.rstrip(b"\r\n")) <= int(length[:18]) < len(data)
    ):
        return data[: int(length[:18])]  # an editor's last newline
    return data


def _decode_chunks(data: bytes) -> bytes:
    """The body without its chunks; as it is where it has none, as in what curl prints."""
    pieces: list[bytes] = []
    position = 0
    while chunk := _CHUNK_PATTERN.match(data, position):
        size = int(chunk[1], 16)
        if size == 0:
            return b"".join(pieces)
        end = chunk.end() + size
        if data[end : end + 2] != b"\r\n" and data[end : end + 1] != b"\n":
            return data
        pieces.append(data[chunk.end() : end])
        position = end + (2 if data[end : end + 1] == b"\r" else 1)
    return data


def _build_answer(status: int, headers: Headers, data: bytes) -> Answer:
    return Answer(status, headers, Body(content=data, length=len(data)))
