"""Two answers of which at least one was cut: what both have of their bodies, as far as it can be told for certain.

A side that was cut goes on somewhere beyond what is held of it, so only what it has is asked of the other side. Items are
compared in their order, since what seems to be missing may be still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from abreast.capture import Answer
from abreast_sidecar.compare import items
from abreast_sidecar.compare.body import PARTIAL_CONTENT, IdentityLookup, detect_format, whole_body_difference
from abreast_sidecar.compare.difference import CompareOptions, Difference
from abreast_sidecar.compare.document import JsonDiff
from abreast_sidecar.compare.effort import estimate_parse_cost
from abreast_sidecar.compare.formats import DecodedBody
from abreast_sidecar.compare.headers import get_header
from abreast_sidecar.compare.media import Format, decode_text, parse_media_type

Truncation = tuple[bool, bool]  # whether old's and new's answer goes on beyond what is held


class TruncatedResult(NamedTuple):
    differences: list[Difference]
    compared_part: str  # what was compared, for people


class _ItemFormat(NamedTuple):
    name: str
    root: str  # what paths begin with
    terminator: bytes  # of an item; line ends are those of Unix here
    parse: Callable[[bytes], list[Any]]  # raise ValueError for what can't be read


def _read_utf8_text(data: bytes) -> str:
    decoded_text = decode_text(data, "utf-8")
    if decoded_text is None or "\0" in decoded_text:
        raise ValueError("no text in UTF-8")
    return decoded_text


_ITEM_FORMATS: dict[Format, _ItemFormat] = {
    "events": _ItemFormat("events", "events", b"\n\n", lambda data: items.parse_sse(_read_utf8_text(data))),
    "ndjson": _ItemFormat("items", "$", b"\n", items.parse_ndjson),
    "text": _ItemFormat("lines", "lines", b"\n", lambda data: items.split_lines(_read_utf8_text(data))),
}


def compare_truncated(
    old: Answer,
    new: Answer,
    truncation: Truncation,
    options: CompareOptions,
    identity_lookup: IdentityLookup | None = None,
) -> TruncatedResult:
    """`cut`: of an answer that broke off; one of which not all is held counts as such here."""
    truncation = (truncation[0] or not old.body.is_complete, truncation[1] or not new.body.is_complete)
    common = min(
        len(side.body.content)
        for side, is_truncated in zip((old, new), truncation, strict=True)
        if is_truncated
    )
    if old.body.content[:common] == new.body.content[:common]:
        return TruncatedResult(
            [], f"the first {common:,} bytes of both" if common else "no body had come yet"
        )
    if _is_compressed(old) or _is_compressed(new):
        return TruncatedResult([], "not the bodies: what is compressed can't be read in part")
    left, right = _to_decoded_body(old), _to_decoded_body(new)
    format_ = detect_format(left, right)
    if format_ != detect_format(right, left):
        return TruncatedResult([], "not the bodies, which are of two types")
    if format_ == "bytes" or {old.status, new.status} == {PARTIAL_CONTENT}:
        return TruncatedResult(
            [whole_body_difference("changed", old, new)], f"the first {common:,} bytes of both"
        )
    if format_ not in _ITEM_FORMATS or estimate_parse_cost(format_, left.data, right.data) > options.max_work:
        return TruncatedResult([], f"not the bodies: of {format_} a part can't be compared")
    return _compare_items(
        _ITEM_FORMATS[format_],
        left.data,
        right.data,
        truncation,
        JsonDiff(options.max_differences, identity_lookup=identity_lookup),
    )


def _to_decoded_body(answer: Answer) -> DecodedBody:
    return DecodedBody(answer.body.content, parse_media_type(get_header(answer.headers, "content-type")))


def _is_compressed(answer: Answer) -> bool:
    return any(name == "content-encoding" and value.lower() != "identity" for name, value in answer.headers)


def _compare_items(
    item_format: _ItemFormat, old: bytes, new: bytes, truncation: Truncation, diff: JsonDiff
) -> TruncatedResult:
    """Complete ones, as many as the cut sides have."""
    try:
        left, right = (
            _parse_items(item_format, data, is_truncated)
            for data, is_truncated in zip((old, new), truncation, strict=True)
        )
    except (ValueError, RecursionError):
        return TruncatedResult([], f"not the bodies, which hold no {item_format.name} that can be read")
    common = min(
        len(side) for side, is_truncated in zip((left, right), truncation, strict=True) if is_truncated
    )
    diff.root = item_format.root
    differences = diff.compare_by_index(left[:common], right[:common])
    return TruncatedResult(differences, f"the first {common:,} {item_format.name} of both")


def _parse_items(
    item_format: _ItemFormat, data: bytes, is_truncated: bool
) -> list[Any]:  # one of two, as they come
    if not is_truncated:
        return item_format.parse(data)
    unix_data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    parsed_items = item_format.parse(
        unix_data[: unix_data.rfind(item_format.terminator) + len(item_format.terminator)]
        if item_format.terminator in unix_data
        else b""
    )
    return (
        parsed_items[:-1] if item_format.name == "lines" else parsed_items
    )  # after the last line's end is a line that goes on
