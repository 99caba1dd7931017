"""Two answers of which at least one was cut: what both have of their bodies, as far as it can be told for certain.

A side that was cut goes on somewhere beyond what is held of it, so only what it has is asked of the other side. Items are
compared in their order, since what seems to be missing may be still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from abreast.capture import Answer
from abreast_sidecar.compare import items
from abreast_sidecar.compare.body import PARTIAL_CONTENT, Keyed, as_a_whole, body_format
from abreast_sidecar.compare.difference import Difference, Rules
from abreast_sidecar.compare.document import DocumentDiff
from abreast_sidecar.compare.effort import reading
from abreast_sidecar.compare.formats import Plain
from abreast_sidecar.compare.headers import first
from abreast_sidecar.compare.media import Format, media, text

Cut = tuple[bool, bool]  # whether old's and new's answer goes on beyond what is held


class Beginning(NamedTuple):
    differences: list[Difference]
    said: str  # what was compared, for people


class _Items(NamedTuple):
    name: str
    root: str  # what paths begin with
    end: bytes  # of an item; line ends are those of Unix here
    read: Callable[[bytes], list[Any]]  # raise ValueError for what can't be read


def _text(data: bytes) -> str:
    found = text(data, "utf-8")
    if found is None or "\0" in found:
        raise ValueError("no text in UTF-8")
    return found


_ITEMS: dict[Format, _Items] = {
    "events": _Items("events", "events", b"\n\n", lambda data: items.events(_text(data))),
    "ndjson": _Items("items", "$", b"\n", items.ndjson),
    "text": _Items("lines", "lines", b"\n", lambda data: items.lines(_text(data))),
}


def compare_beginnings(
    old: Answer, new: Answer, cut: Cut, rules: Rules, keyed: Keyed | None = None
) -> Beginning:
    """`cut`: of an answer that broke off; one of which not all is held counts as such here."""
    cut = (cut[0] or not old.body.whole, cut[1] or not new.body.whole)
    common = min(len(side.body.held) for side, goes_on in zip((old, new), cut, strict=True) if goes_on)
    if old.body.held[:common] == new.body.held[:common]:
        return Beginning([], f"the first {common:,} bytes of both" if common else "no body had come yet")
    if _coding(old) or _coding(new):
        return Beginning([], "not the bodies: what is compressed can't be read in part")
    left, right = _plain(old), _plain(new)
    kind = body_format(left, right)
    if kind != body_format(right, left):
        return Beginning([], "not the bodies, which are of two types")
    if kind == "bytes" or {old.status, new.status} == {PARTIAL_CONTENT}:
        return Beginning([as_a_whole("changed", old, new)], f"the first {common:,} bytes of both")
    if kind not in _ITEMS or reading(kind, left.data, right.data) > rules.max_work:
        return Beginning([], f"not the bodies: of {kind} a part can't be compared")
    return _items(_ITEMS[kind], left.data, right.data, cut, DocumentDiff(rules.max_differences, keyed=keyed))


def _plain(answer: Answer) -> Plain:
    return Plain(answer.body.held, media(first(answer.headers, "content-type")))


def _coding(answer: Answer) -> bool:
    return any(name == "content-encoding" and value.lower() != "identity" for name, value in answer.headers)


def _items(known: _Items, old: bytes, new: bytes, cut: Cut, walk: DocumentDiff) -> Beginning:
    """Complete ones, as many as the cut sides have."""
    try:
        left, right = (_read(known, data, goes_on) for data, goes_on in zip((old, new), cut, strict=True))
    except (ValueError, RecursionError):
        return Beginning([], f"not the bodies, which hold no {known.name} that can be read")
    common = min(len(side) for side, goes_on in zip((left, right), cut, strict=True) if goes_on)
    walk.root = known.root
    found = walk.compare_in_order(left[:common], right[:common])
    return Beginning(found, f"the first {common:,} {known.name} of both")


def _read(known: _Items, data: bytes, goes_on: bool) -> list[Any]:  # one of two, as they come
    if not goes_on:
        return known.read(data)
    plain = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    found = known.read(plain[: plain.rfind(known.end) + len(known.end)] if known.end in plain else b"")
    return found[:-1] if known.name == "lines" else found  # after the last line's end is a line that goes on
