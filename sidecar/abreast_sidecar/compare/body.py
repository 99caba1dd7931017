"""Differences between two bodies. Equal bytes are never parsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from abreast.capture import Answer, Body
from abreast_sidecar.compare.coding import Decoded, decoded
from abreast_sidecar.compare.difference import Difference, Impact, Kind, Rules
from abreast_sidecar.compare.document import DocumentDiff
from abreast_sidecar.compare.effort import reading
from abreast_sidecar.compare.formats import Plain, UnreadableError, documents, json_text
from abreast_sidecar.compare.headers import first
from abreast_sidecar.compare.media import Format, byte_order_mark, media, sniffed
from abreast_sidecar.compare.texts import TextDiff
from abreast_sidecar.compare.value import parse, shown

PREVIEW = 50  # characters of a body that has no structure
PARTIAL_CONTENT = 206
ENCODING = (
    "(encoding)"  # the path of a byte order mark, or of another encoding than UTF-8 that nothing declares
)

COARSE = "parts of the bodies are too much work to be compared in detail, and are compared as a whole"
TOO_MUCH = "the bodies are too much work to be read, and are compared by their bytes"

Keyed = Callable[[str], str]


class BodyResult(NamedTuple):
    differences: list[Difference]
    note: str = ""  # what is odd about the bodies, for people
    unreadable: bool = False  # the bytes differ and can't be decoded, so nothing is known
    too_large: bool = False  # only the bytes as sent were compared
    partial: bool = False  # only what came before an answer was cut


def body_differences(old: Answer, new: Answer, rules: Rules) -> list[Difference]:
    return compare_bodies(old, new, rules).differences


def same_bytes(old: Body, new: Body) -> bool:
    if old.length != new.length:
        return False
    if old.whole and new.whole:
        return old.held == new.held
    return old.fingerprint() == new.fingerprint()


def compare_bodies(old: Answer, new: Answer, rules: Rules, keyed: Keyed | None = None) -> BodyResult:
    whole = old.body.whole and new.body.whole
    if old.body.held == new.body.held if whole else same_bytes(old.body, new.body):
        return BodyResult([])
    if not whole:
        return BodyResult([as_a_whole("changed", old, new)])
    if not old.body.length or not new.body.length:
        return BodyResult([as_a_whole("added" if new.body.length else "removed", old, new)])
    if _is_plain_json(old) and _is_plain_json(new) and (found := _plain_json(old, new, rules, keyed)):
        return found
    left, right = _decoded(old, rules), _decoded(new, rules)
    if left.problem or right.problem:
        return _undecoded(left, right, old, new)
    if left.data == right.data:
        return BodyResult([])
    sides = (
        Plain(left.data, media(first(old.headers, "content-type"))),
        Plain(right.data, media(first(new.headers, "content-type"))),
    )
    found = _compared(Comparison(old, new, *sides, rules, keyed))
    return found._replace(note=_both(_untyped(*sides), found.note))


def _is_plain_json(answer: Answer) -> bool:
    """What nearly all answers are: JSON that is not compressed, in UTF-8."""
    said = ""
    for name, value in answer.headers:
        if name == "content-type":
            said = said or value
        elif name == "content-encoding":
            return False
    return media(said).format == "json" and b"\0" < answer.body.held[:1] < b"\x80"


def _plain_json(old: Answer, new: Answer, rules: Rules, keyed: Keyed | None) -> BodyResult | None:
    """Nothing where it is not so simple after all."""
    length = old.body.length + new.body.length
    spent = reading("json", old.body.held, new.body.held) if length > rules.max_work // 2 else 0
    if PARTIAL_CONTENT in (old.status, new.status) or spent > rules.max_work:
        return None
    try:
        walk = TextDiff(rules.max_differences, keyed=keyed, max_work=rules.max_work - spent)
        return BodyResult(walk.compare_texts(old.body.held, new.body.held), COARSE if walk.coarse else "")
    except (ValueError, RecursionError):
        return None


def _decoded(answer: Answer, rules: Rules) -> Decoded:
    coding = ",".join([value for name, value in answer.headers if name == "content-encoding"])
    return decoded(answer.body.held, coding, rules.max_decoded) if coding else Decoded(answer.body.held)


def _undecoded(left: Decoded, right: Decoded, old: Answer, new: Answer) -> BodyResult:
    problems = {left.problem, right.problem}
    sides = " and ".join(name for name, side in (("old", left), ("new", right)) if side.problem)
    coding = left.coding or right.coding
    if "unknown" in problems:
        return BodyResult([], f"content-encoding {coding} can't be decoded here: {sides}", unreadable=True)
    if "too large" in problems:
        note = f"a compressed body is larger than what is decoded: {sides}"
        return BodyResult([as_a_whole("changed", old, new)], note, too_large=True)
    kind: Kind = "changed" if left.problem == right.problem else "type"
    return BodyResult([as_a_whole(kind, old, new)], f"the body is not the {coding} its header says: {sides}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two bodies that differ, held and decoded."""

    old: Answer
    new: Answer
    left: Plain
    right: Plain
    rules: Rules
    keyed: Keyed | None

    def spent(self, kind: Format) -> int:
        """Steps that reading both takes."""
        return reading(kind, self.left.data, self.right.data)

    def too_much(self, kind: Format) -> bool:
        return self.spent(kind) > self.rules.max_work

    def whole(self, kind: Kind) -> Difference:
        return as_a_whole(kind, self.old, self.new)

    def partial(self) -> bool:
        return PARTIAL_CONTENT in (self.old.status, self.new.status)


def _compared(pair: Comparison) -> BodyResult:
    left, right = body_format(pair.left, pair.right), body_format(pair.right, pair.left)
    if "json" in {left, right} and pair.too_much("json"):
        return BodyResult([pair.whole("changed")], TOO_MUCH, too_large=True)
    if left == right == "json" and not pair.partial():
        return _json(pair)
    if pair.partial() and "multipart" not in {left, right}:
        return BodyResult([pair.whole("changed")], "a part of a body is compared by its bytes")
    if "json" in {left, right}:
        kind: Kind = "type" if _is_json(pair.left) != _is_json(pair.right) else "changed"
        return BodyResult([pair.whole(kind)], "one body is JSON")
    found = _mislabelled(pair, left) if left == right else None
    if found is not None:
        return found
    if left != right and "bytes" in {left, right}:
        return BodyResult([pair.whole("type")])
    return _structured(pair, left if left == right else "text")


def _untyped(old: Plain, new: Plain) -> str:
    """Nobody says what it is."""
    without = [name for name, side in (("old", old), ("new", new)) if not side.media.essence]
    return f"no content type: {' and '.join(without)}" if without else ""


def body_format(side: Plain, other: Plain) -> Format:
    """What it says it is; else what the other says; else what it begins like."""
    for said in (side.media, other.media if not side.media.essence else side.media):
        if said.format != "unknown":
            return said.format
    return sniffed(side.data)


def _json(pair: Comparison) -> BodyResult:
    walk = TextDiff(
        pair.rules.max_differences, keyed=pair.keyed, max_work=pair.rules.max_work - pair.spent("json")
    )
    try:
        found = walk.compare_texts(json_text(pair.left.data), json_text(pair.right.data))
    except ValueError:
        return _not_json(pair)
    except RecursionError:  # deeper than any reader of it goes
        found = [pair.whole("changed")]
    return BodyResult([*_encodings(pair), *found], COARSE if walk.coarse else "")


def _is_json(side: Plain) -> bool:
    try:
        parse(json_text(side.data))
    except (ValueError, RecursionError):
        return False
    return True


def _not_json(pair: Comparison) -> BodyResult:
    left, right = _is_json(pair.left), _is_json(pair.right)
    if left != right:
        return BodyResult([pair.whole("type")], f"{'old' if right else 'new'}'s body is not valid JSON")
    found = _structured(pair, "text")
    return found._replace(
        note=_both("the content type says JSON, and neither body is valid JSON", found.note)
    )


def _mislabelled(pair: Comparison, kind: Format) -> BodyResult | None:
    """JSON under the name of something else is compared by its paths too."""
    if kind not in {"text", "html", "xml", "form", "multipart", "bytes"} or {
        sniffed(pair.left.data),
        sniffed(pair.right.data),
    } != {"json"}:
        return None
    if pair.too_much("json") or not (_is_json(pair.left) and _is_json(pair.right)):
        return None
    found = _json(pair)
    if kind == "text" and not found.differences:
        return None  # then it differs as the text that it says it is
    said = f"the content type says {pair.left.media.essence}, and the bodies are JSON"
    return found._replace(note=_both(said, found.note))


def _both(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _structured(pair: Comparison, kind: Format) -> BodyResult:
    if pair.too_much(kind):
        return _unread(pair, kind)
    try:
        found = documents(kind, pair.left, pair.right)
    except UnreadableError as error:
        if error.old != error.new:
            side = "old" if error.old else "new"
            return BodyResult([pair.whole("type")], f"{side}'s body is not the {kind} it claims to be")
        if kind in {"text", "bytes", "unknown"}:
            return BodyResult([pair.whole("changed")])
        coarse = _structured(pair, "text")
        return coarse._replace(note=_both(f"neither body is the {kind} it claims to be", coarse.note))
    differences, note = _walked(pair, found.old, found.new, found.root, pair.spent(kind))
    if not differences and not found.alike():
        differences = [as_a_whole("order", pair.old, pair.new, found.root)]
    return BodyResult([*_encodings(pair), *differences], note)


def _unread(pair: Comparison, kind: Format) -> BodyResult:
    """Markup is compared by its lines, all else and what has too many of these by its bytes."""
    if kind in {"html", "xml"} and not pair.too_much("text"):
        return _structured(pair, "text")._replace(note=f"too much {kind} to be read: compared by its lines")
    return BodyResult([pair.whole("changed")], TOO_MUCH, too_large=True)


def _walked(
    pair: Comparison, old: object, new: object, root: str, spent: int
) -> tuple[list[Difference], str]:
    """The differences and a note."""
    left = pair.rules.max_work - spent
    walk = DocumentDiff(pair.rules.max_differences, root=root, keyed=pair.keyed, max_work=left)
    try:
        return walk.compare(old, new), COARSE if walk.coarse else ""
    except RecursionError:  # deeper than any reader of it goes
        return [pair.whole("changed")], ""


def _encodings(pair: Comparison) -> list[Difference]:
    old, new = _encoding(pair.left.data), _encoding(pair.right.data)
    if old == new:
        return []
    impact: Impact = "breaking" if old == "utf-8" else "value"
    return [Difference.told("body", ENCODING, ENCODING, "changed", impact, shown(old), shown(new))]


def _encoding(data: bytes) -> str:
    mark, name = byte_order_mark(data)
    if mark:
        return f"{name} with a byte order mark"
    return json.detect_encoding(data[:4]) if b"\0" in data[:4] else "utf-8"


def as_a_whole(kind: Kind, old: Answer, new: Answer, path: str = "") -> Difference:
    impacts: dict[Kind, Impact] = {"added": "value", "changed": "value", "order": "value"}
    return Difference.told(
        part="body",
        path=path,
        place=path,
        kind=kind,
        impact=impacts.get(kind, "breaking"),
        old=None if kind == "added" else preview(old),
        new=None if kind == "removed" else preview(new),
    )


def preview(answer: Answer) -> str:
    """JSON text that says what a person needs: the length, the digest, the type, how a text begins."""
    body = answer.body
    kind = sniffed(body.held)
    said = media(first(answer.headers, "content-type")).essence
    told = {"length": body.length, "digest": body.fingerprint(), "type": said[:PREVIEW] or kind}
    if kind != "bytes":
        told["beginning"] = body.held[: 4 * PREVIEW].decode("utf-8", "replace")[:PREVIEW]
    return shown(told)
