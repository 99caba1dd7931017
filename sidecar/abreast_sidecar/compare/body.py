"""Differences between two bodies. Equal bytes are never parsed."""

from __future__ import annotations

import zlib
from typing import Any

from abreast.capture import Answer, Body
from abreast_sidecar.compare.difference import Difference, Kind, Rules
from abreast_sidecar.compare.document import DocumentDiff
from abreast_sidecar.compare.headers import first
from abreast_sidecar.compare.value import VALUE_LIMIT, NotJsonError, parse, shown

GZIP_OR_ZLIB = 47  # zlib's wbits: 15, plus 32 to find out which
PREVIEW = 120  # characters of a body that is no JSON


def same_bytes(old: Body, new: Body) -> bool:
    if old.length != new.length:
        return False
    if old.whole and new.whole:
        return old.held == new.held
    return old.fingerprint() == new.fingerprint()


def body_differences(old: Answer, new: Answer, rules: Rules) -> list[Difference]:
    if same_bytes(old.body, new.body):
        return []
    if not (old.body.whole and new.body.whole):
        return [_whole("changed", old.body, new.body)]
    if not old.body.length or not new.body.length:
        return [_whole("added" if new.body.length else "removed", old.body, new.body)]
    left, right = _json(old, rules), _json(new, rules)
    if left is _NOT_JSON and right is _NOT_JSON:
        same = _decoded(old, rules) == _decoded(new, rules)
        return [] if same else [_whole("changed", old.body, new.body)]
    if left is _NOT_JSON or right is _NOT_JSON:
        return [_whole("type", old.body, new.body)]
    try:
        return DocumentDiff(rules.max_differences).compare(left, right)
    except RecursionError:  # deeper than any reader of it goes
        return [_whole("changed", old.body, new.body)]


_NOT_JSON: Any = object()


def _json(answer: Answer, rules: Rules) -> Any:
    body = _decoded(answer, rules)
    if not _claims_json(answer, body):
        return _NOT_JSON
    try:
        return parse(body)
    except NotJsonError:
        return _NOT_JSON


def _claims_json(answer: Answer, body: bytes) -> bool:
    kind = first(answer.headers, "content-type").partition(";")[0].strip().lower()
    if kind:
        return kind.endswith(("/json", "+json"))
    return body.lstrip()[:1] in {b"{", b"["}


def _decoded(answer: Answer, rules: Rules) -> bytes:
    """The body without gzip or deflate; as it is where that fails or grows too large."""
    body = answer.body.held
    if first(answer.headers, "content-encoding").strip().lower() not in {"gzip", "x-gzip", "deflate"}:
        return body
    reader = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        plain = reader.decompress(body, rules.max_decoded)
    except zlib.error:
        return body
    return plain if reader.eof else body


def _whole(kind: Kind, old: Body, new: Body) -> Difference:
    return Difference(
        part="body",
        path="",
        place="",
        kind=kind,
        impact="additive" if kind == "added" else "value" if kind == "changed" else "breaking",
        old=None if kind == "added" else preview(old),
        new=None if kind == "removed" else preview(new),
    )


def preview(body: Body) -> str:
    """JSON text that says what a person needs: the beginning, the length, the digest."""
    beginning = body.held[: VALUE_LIMIT // 4].decode("utf-8", "replace")[:PREVIEW]
    return shown({"length": body.length, "digest": body.fingerprint(), "beginning": beginning})
