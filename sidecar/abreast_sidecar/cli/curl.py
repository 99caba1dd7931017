"""A captured request as a line for the shell."""

from __future__ import annotations

import shlex

from abreast.redact import MARK
from abreast.v1 import comparison_pb2 as api

URL = '"$URL"'  # the reader's own: nobody but them knows which address may be asked
BY_CURL = {"host", "content-length", "accept-encoding", "connection", "transfer-encoding", "x-request-id"}
LONGEST_BODY = 4000  # bytes; a longer one does not fit on a line


def curl(detail: api.PairDetail, url: str = "") -> tuple[str, list[str]]:
    """The line, and what it lacks of the request."""
    words = ["curl", "-i"]
    lacks = []
    method = detail.pair.endpoint.method
    if method == "HEAD":
        words.append("--head")
    elif method != ("POST" if detail.request_body else "GET"):
        words += ["-X", shlex.quote(method)]
    for header in detail.request_headers:
        if MARK in header.value:
            lacks.append(f"its {header.name} (a secret, kept as a hash only)")
        elif header.name not in BY_CURL and header.value.isprintable():
            words += ["-H", shlex.quote(f"{header.name}: {header.value}")]
    words += _body(detail.request_body, lacks)
    words.append((shlex.quote(url.rstrip("/")) if url else URL) + shlex.quote(detail.pair.request))
    return " ".join(words), lacks


def _body(body: bytes, lacks: list[str]) -> list[str]:
    if not body:
        return []
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or len(body) > LONGEST_BODY or any(ord(c) < 32 and c not in "\n\t" for c in text):
        lacks.append(f"its body ({len(body)} bytes; see --json)")
        return []
    return ["--data-raw", shlex.quote(text)]
