"""A captured request as a line for bash or zsh, that asks the same again."""

from __future__ import annotations

import shlex

from abreast.redact import HASH_PREFIX
from abreast.v1 import comparison_pb2 as api

URL_PLACEHOLDER = '"$URL"'  # the reader's own: nobody but them knows which address may be asked
CURL_OWN_HEADERS = {
    "host",
    "content-length",
    "accept-encoding",
    "connection",
    "transfer-encoding",
    "x-request-id",
}
MAX_CURL_BODY_BYTES = 4000  # bytes; a longer one does not fit on a line
UNESCAPED_BYTES = frozenset(range(32, 127)) - set(b"\\'")


def build_curl_line(detail: api.PairDetail, url: str = "") -> tuple[str, list[str]]:
    """The line, and what it lacks of the request."""
    omissions: list[str] = []
    target = detail.pair.request
    body = _body_arguments(detail, omissions)
    arguments = [
        "curl",
        "-i",
        *_path_arguments(target),
        *_method_arguments(detail.pair.endpoint.method, body=bool(body)),
    ]
    for header in detail.request_headers:
        arguments += _header_arguments(header.name, header.value, omissions)
    if body and all(header.name != "content-type" for header in detail.request_headers):
        arguments += ["-H", "'content-type:'"]  # or curl names one
    arguments += body
    arguments.append(
        (shlex.quote(url.rstrip("/")) if url else URL_PLACEHOLDER) + _quote_bytes(target.encode())
    )
    return " ".join(arguments), omissions


def _path_arguments(target: str) -> list[str]:
    """curl would expand brackets and shorten dots."""
    arguments = ["-g"] if any(mark in target for mark in "[]{}") else []
    return [*arguments, "--path-as-is"] if "/." in target else arguments


def _method_arguments(method: str, *, body: bool) -> list[str]:
    if method == "HEAD":
        return ["--head"]
    return [] if method == ("POST" if body else "GET") else ["-X", shlex.quote(method)]


def _header_arguments(name: str, value: str, omissions: list[str]) -> list[str]:
    if name in CURL_OWN_HEADERS:
        return []
    if HASH_PREFIX in value:
        omissions.append(f"its {name} (a secret, kept as a hash only)")
        return []
    if not (value.isascii() and value.isprintable()):
        omissions.append(f"its {name} (characters that a line can't hold; see --json)")
        return []
    return ["-H", shlex.quote(f"{name}: {value}" if value else f"{name};")]


def _body_arguments(detail: api.PairDetail, omissions: list[str]) -> list[str]:
    body = detail.request_body
    if not body:
        return []
    if len(body) > MAX_CURL_BODY_BYTES or b"\0" in body or detail.pair.endpoint.method == "HEAD":
        omissions.append(f"its body ({len(body)} bytes; see --json)")
        return []
    return ["--data-raw", _quote_bytes(body)]


def _quote_bytes(value: bytes) -> str:
    """In single quotes where all can be shown, else byte by byte."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and (text or not value):
        return shlex.quote(text)
    return "$'" + "".join(chr(byte) if byte in UNESCAPED_BYTES else f"\\x{byte:02x}" for byte in value) + "'"
