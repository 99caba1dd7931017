"""A captured request as a line for bash or zsh, that asks the same again."""

from __future__ import annotations

import shlex

from abreast.redact import MARK
from abreast.v1 import comparison_pb2 as api

URL = '"$URL"'  # the reader's own: nobody but them knows which address may be asked
BY_CURL = {"host", "content-length", "accept-encoding", "connection", "transfer-encoding", "x-request-id"}
LONGEST_BODY = 4000  # bytes; a longer one does not fit on a line
PLAIN = frozenset(range(32, 127)) - set(b"\\'")


def curl(detail: api.PairDetail, url: str = "") -> tuple[str, list[str]]:
    """The line, and what it lacks of the request."""
    lacks: list[str] = []
    target = detail.pair.request
    body = _body(detail, lacks)
    words = ["curl", "-i", *_as_it_is(target), *_method(detail.pair.endpoint.method, body=bool(body))]
    for header in detail.request_headers:
        words += _header(header.name, header.value, lacks)
    if body and all(header.name != "content-type" for header in detail.request_headers):
        words += ["-H", "'content-type:'"]  # or curl names one
    words += body
    words.append((shlex.quote(url.rstrip("/")) if url else URL) + _quoted(target.encode()))
    return " ".join(words), lacks


def _as_it_is(target: str) -> list[str]:
    """curl would expand brackets and shorten dots."""
    found = ["-g"] if any(mark in target for mark in "[]{}") else []
    return [*found, "--path-as-is"] if "/." in target else found


def _method(method: str, *, body: bool) -> list[str]:
    if method == "HEAD":
        return ["--head"]
    return [] if method == ("POST" if body else "GET") else ["-X", shlex.quote(method)]


def _header(name: str, value: str, lacks: list[str]) -> list[str]:
    if name in BY_CURL:
        return []
    if MARK in value:
        lacks.append(f"its {name} (a secret, kept as a hash only)")
        return []
    if not (value.isascii() and value.isprintable()):
        lacks.append(f"its {name} (characters that a line can't hold; see --json)")
        return []
    return ["-H", shlex.quote(f"{name}: {value}" if value else f"{name};")]


def _body(detail: api.PairDetail, lacks: list[str]) -> list[str]:
    body = detail.request_body
    if not body:
        return []
    if len(body) > LONGEST_BODY or b"\0" in body or detail.pair.endpoint.method == "HEAD":
        lacks.append(f"its body ({len(body)} bytes; see --json)")
        return []
    return ["--data-raw", _quoted(body)]


def _quoted(value: bytes) -> str:
    """In single quotes where all can be shown, else byte by byte."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and (text or not value):
        return shlex.quote(text)
    return "$'" + "".join(chr(byte) if byte in PLAIN else f"\\x{byte:02x}" for byte in value) + "'"
