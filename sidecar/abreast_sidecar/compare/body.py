"""Differences between two bodies, complete or truncated. Equal bytes are never parsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from abreast.protocol.capture import HASH_PREFIX, Answer, Body
from abreast_sidecar.compare import documents
from abreast_sidecar.compare.content import (
    GRPC_TYPE,
    DecodeResult,
    Format,
    MediaType,
    decode_content,
    decode_text,
    estimate_parse_cost,
    find_byte_order_mark,
    parse_media_type,
    sniff_format,
)
from abreast_sidecar.compare.headers import CONVERTED_TYPES, get_header
from abreast_sidecar.compare.json_diff import DifferenceClassifier, JsonDiff, JsonTextDiff
from abreast_sidecar.compare.model import Difference, Impact, Kind, RenderedValues
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.values import parse, render_value

MASKED_HASH = f"{HASH_PREFIX}{'0' * 8}:{'0' * 32}"  # in place of hashes with different keys, and as long
PREVIEW_CHARS = 50  # characters of a body that has no structure
PARTIAL_CONTENT = 206
ENCODING_PATH = "(encoding)"  # path for a byte order mark or an undeclared encoding other than UTF-8

DIFF_OVER_BUDGET_NOTE = "parts of the bodies are compared as a whole: comparing them in detail is too much work"
CONVERTED_ONCE_NOTE = "the collector had the descriptors for one of the bodies only"
PARSE_OVER_BUDGET_NOTE = "the bodies are compared by their bytes: parsing them is too much work"

IdentityLookup = Callable[[str], str]  # the identity field of the array at a generalised path, or an empty text
Truncation = tuple[bool, bool]  # True if the body of old, or of new, is truncated
_PARSE_FAILED: Any = object()


class DecodedBody(NamedTuple):
    """A body without content coding."""

    data: bytes
    media_type: MediaType


def normalise_json_encoding(data: bytes) -> bytes:
    """Remove a byte order mark, and convert to UTF-8 from the encoding that it states. Raise ValueError."""
    mark, name = find_byte_order_mark(data)
    if not mark:
        return data
    return data[len(mark) :] if name == "utf-8" else data.decode(name).encode()


def _read_text(side: DecodedBody) -> str:
    text = decode_text(side.data, side.media_type.get_parameter("charset"))
    if text is None:
        raise ValueError("the body is not text")
    return text


def _read_xml_body(side: DecodedBody) -> documents.Element:
    charset = side.media_type.get_parameter("charset")
    return documents.read_xml(_read_text(side) if charset and b"encoding=" not in side.data[:100] else side.data)


def _read_lines(side: DecodedBody) -> list[str]:
    split = documents.split_csv_lines if side.media_type.essence == "text/csv" else documents.split_lines
    return split(_read_text(side))


_DOCUMENT_PARSERS: dict[Format, tuple[str, Callable[[DecodedBody], Any]]] = {
    "ndjson": ("$", lambda side: documents.parse_ndjson(side.data)),
    "events": ("events", lambda side: documents.parse_sse(_read_text(side))),
    "form": ("form", lambda side: documents.parse_form(_read_text(side).strip())),
    "multipart": ("parts", lambda side: documents.parse_multipart(side.data, side.media_type)),
    "html": ("html", lambda side: documents.read_html(_read_text(side))),
    "xml": ("xml", _read_xml_body),
    "text": ("lines", _read_lines),
}


class BodyResult(NamedTuple):
    differences: list[Difference]
    note: str = ""  # anomalies of the bodies, for people
    is_unreadable: bool = False  # the bytes differ and can't be decoded
    is_too_large: bool = False  # only the bytes were compared, as sent
    is_partial: bool = False  # a response broke off, or differences are not listed: without a finding, it is no match

    def with_note(self, note: str) -> BodyResult:
        """Put a note before the others."""
        return self._replace(note=f"{note}; {self.note}" if self.note else note)


def _make_result(diff: JsonDiff, differences: list[Difference]) -> BodyResult:
    if not (diff.budget_exceeded or diff.omitted_count or diff.repeat_count):
        return BodyResult(differences)
    notes = [DIFF_OVER_BUDGET_NOTE] if diff.budget_exceeded else []
    return BodyResult(differences, "; ".join([*notes, *describe_unlisted(diff)]), is_partial=diff.omitted_count > 0)


def describe_unlisted(diff: JsonDiff) -> list[str]:
    """Return notes about differences that are not in the list."""
    notes = []
    if diff.omitted_count:
        notes.append(f"{diff.omitted_count:,} differences are not listed: there are too many")
    if repeat_count := diff.repeat_count:
        notes.append(f"{repeat_count:,} more differences are like those listed at their paths")
    return notes


def is_same_content(old: Body, new: Body) -> bool:
    if old.length != new.length:
        return False
    if old.is_complete and new.is_complete:
        return old.content == new.content
    return old.fingerprint() == new.fingerprint()


def compare_bodies(
    old: Answer,
    new: Answer,
    options: CompareOptions,
    identity_lookup: IdentityLookup | None = None,
    classify: DifferenceClassifier | None = None,
) -> BodyResult:
    both_complete = old.body.is_complete and new.body.is_complete
    is_masked = not both_complete and MASKED_HASH in old.body.digest
    if old.body.content == new.body.content if both_complete else not is_masked and is_same_content(old.body, new.body):
        if old.body.has_part_checksum:
            return BodyResult(
                [], "only the first bytes and the length were compared: Envoy hashes 8 MiB", is_partial=True
            )
        return BodyResult([])
    is_plain_json = both_complete and _is_plain_json(old) and _is_plain_json(new)
    if is_plain_json and (plain_result := _compare_plain_json(old, new, options, identity_lookup, classify)):
        return plain_result
    if _is_converted_once(old, new):
        return BodyResult([], CONVERTED_ONCE_NOTE, is_unreadable=True)
    if not both_complete:
        return _compare_incomplete(old, new)
    if not old.body.length or not new.body.length:
        return BodyResult([whole_body_difference("added" if new.body.length else "removed", old, new)])
    left, right = _decode_answer(old, options), _decode_answer(new, options)
    if left.problem or right.problem:
        return _make_undecodable_result(left, right, old, new)
    if left.data == right.data:
        return BodyResult([])
    sides = _attach_media_type(old, left.data), _attach_media_type(new, right.data)
    result = _compare_decoded(BodyPair(old, new, *sides, options, identity_lookup, classify))
    unlabelled = [name for name, side in zip(("old", "new"), sides, strict=True) if not side.media_type.essence]
    return result.with_note(f"no content type: {' and '.join(unlabelled)}") if unlabelled else result


def _is_converted_once(old: Answer, new: Answer) -> bool:
    """Tell whether the collector had the descriptors for one body only. Bodies above the limit have a checksum."""
    sides = old, new
    types = [parse_media_type(get_header(side.headers, "content-type")).essence for side in sides]
    if not any(essence in CONVERTED_TYPES for essence in types):
        return False
    return any(
        essence not in CONVERTED_TYPES
        and essence.startswith(GRPC_TYPE)
        and side.body.length > 0
        and not side.body.has_checksum
        for essence, side in zip(types, sides, strict=True)
    )


def _compare_incomplete(old: Answer, new: Answer) -> BodyResult:
    """Compare bodies of which parts are missing, and whose lengths or digests differ."""
    common = min(len(old.body.content), len(new.body.content))
    reason = ""
    if old.body.has_checksum != new.body.has_checksum:
        reason = "Envoy and a middleware make different digests"
    elif MASKED_HASH in old.body.digest:
        reason = "the digests have different keys; set ABREAST_REDACT_KEY in all processes"
    if reason and old.body.length == new.body.length and old.body.content[:common] == new.body.content[:common]:
        note = f"only the first {common:,} bytes and the length were compared: {reason}"
        return BodyResult([], note, is_partial=True)
    return BodyResult([whole_body_difference("changed", old, new)])


def _is_plain_json(answer: Answer) -> bool:
    """Detect the most frequent case: JSON in UTF-8, not compressed."""
    content_type = ""
    for name, value in answer.headers:
        if name == "content-type":
            content_type = content_type or value
        elif name == "content-encoding":
            return False
    return parse_media_type(content_type).format == "json" and b"\0" < answer.body.content[:1] < b"\x80"


def _compare_plain_json(
    old: Answer,
    new: Answer,
    options: CompareOptions,
    identity_lookup: IdentityLookup | None,
    classify: DifferenceClassifier | None,
) -> BodyResult | None:
    """Compare without decoding. Return None if the bodies need the full comparison."""
    length = old.body.length + new.body.length
    cost = estimate_parse_cost("json", old.body.content, new.body.content) if length > options.max_work // 2 else 0
    if PARTIAL_CONTENT in (old.status, new.status) or cost > options.max_work:
        return None
    try:
        diff = JsonTextDiff(
            options.max_differences,
            identity_lookup=identity_lookup,
            classify=classify,
            max_work=options.max_work - cost,
        )
        differences = diff.compare_texts(old.body.content, new.body.content)
        return _make_result(diff, differences)
    except (ValueError, RecursionError):
        return None


def _decode_answer(answer: Answer, options: CompareOptions) -> DecodeResult:
    coding = ",".join([value for name, value in answer.headers if name == "content-encoding"])
    return decode_content(answer.body.content, coding, options.max_decoded_bytes)


def _attach_media_type(answer: Answer, data: bytes) -> DecodedBody:
    return DecodedBody(data, parse_media_type(get_header(answer.headers, "content-type")))


def _make_undecodable_result(left: DecodeResult, right: DecodeResult, old: Answer, new: Answer) -> BodyResult:
    problems = {left.problem, right.problem}
    sides = " and ".join(name for name, side in (("old", left), ("new", right)) if side.problem)
    coding = left.coding or right.coding
    if "unknown" in problems:
        return BodyResult([], f"content-encoding {coding} can't be decoded: {sides}", is_unreadable=True)
    if "too large" in problems:
        note = f"a compressed body is larger than the decoding limit: {sides}"
        return BodyResult([whole_body_difference("changed", old, new)], note, is_too_large=True)
    kind: Kind = "changed" if left.problem == right.problem else "type"
    return BodyResult(
        [whole_body_difference(kind, old, new)], f"the body is not {coding} as its header states: {sides}"
    )


@dataclass(frozen=True, slots=True)
class BodyPair:
    """Two complete bodies that differ, decoded."""

    old: Answer
    new: Answer
    left: DecodedBody
    right: DecodedBody
    options: CompareOptions
    identity_lookup: IdentityLookup | None
    classify: DifferenceClassifier | None

    def cost(self, format_: Format) -> int:
        """Estimate the steps to parse both."""
        return estimate_parse_cost(format_, self.left.data, self.right.data)

    def is_over_budget(self, format_: Format) -> bool:
        return self.cost(format_) > self.options.max_work

    def whole_difference(self, kind: Kind) -> Difference:
        return whole_body_difference(kind, self.old, self.new)

    def is_partial_content(self) -> bool:
        return PARTIAL_CONTENT in (self.old.status, self.new.status)


def _compare_decoded(pair: BodyPair) -> BodyResult:
    left, right = detect_format(pair.left, pair.right), detect_format(pair.right, pair.left)
    if "json" in {left, right} and pair.is_over_budget("json"):
        return BodyResult([pair.whole_difference("changed")], PARSE_OVER_BUDGET_NOTE, is_too_large=True)
    if left == right == "json" and not pair.is_partial_content():
        return _compare_json(pair)
    if pair.is_partial_content() and "multipart" not in {left, right}:
        return BodyResult([pair.whole_difference("changed")], "partial content is compared by its bytes")
    if "json" in {left, right}:
        kind: Kind = "type" if _is_json(pair.left) != _is_json(pair.right) else "changed"
        return BodyResult([pair.whole_difference(kind)], "one body is JSON")
    result = _compare_mislabelled_json(pair, left) if left == right else None
    if result is not None:
        return result
    if left != right and "bytes" in {left, right}:
        return BodyResult([pair.whole_difference("type")])
    return _compare_documents(pair, left if left == right else "text")


def detect_format(side: DecodedBody, other: DecodedBody) -> Format:
    """Return the declared format, or that of the other body, or a guess from the first bytes."""
    for media_type in (side.media_type, other.media_type if not side.media_type.essence else side.media_type):
        if media_type.format != "unknown":
            return media_type.format
    return sniff_format(side.data)


def _compare_json(pair: BodyPair) -> BodyResult:
    max_work = pair.options.max_work - pair.cost("json")
    diff = JsonTextDiff(
        pair.options.max_differences, identity_lookup=pair.identity_lookup, classify=pair.classify, max_work=max_work
    )
    try:
        left, right = normalise_json_encoding(pair.left.data), normalise_json_encoding(pair.right.data)
        differences = diff.compare_texts(left, right)
    except ValueError:
        old_is_json = _is_json(pair.left)
        if old_is_json != _is_json(pair.right):
            note = f"{'new' if old_is_json else 'old'}'s body is not valid JSON"
            return BodyResult([pair.whole_difference("type")], note)
        note = "the content type says JSON, and neither body is valid JSON"
        return _compare_documents(pair, "text").with_note(note)
    except RecursionError:  # deeper than the parsers go
        differences = [pair.whole_difference("changed")]
    return _make_result(diff, [*_diff_encodings(pair), *differences])


def _is_json(side: DecodedBody) -> bool:
    try:
        parse(normalise_json_encoding(side.data))
    except (ValueError, RecursionError):
        return False
    return True


def _compare_mislabelled_json(pair: BodyPair, format_: Format) -> BodyResult | None:
    """Compare JSON with another content type by its paths. Return None if the bodies are not JSON."""
    if format_ not in {"text", "html", "xml", "form", "multipart", "bytes"}:
        return None
    if any(sniff_format(side.data) != "json" for side in (pair.left, pair.right)):
        return None
    if pair.is_over_budget("json") or not (_is_json(pair.left) and _is_json(pair.right)):
        return None
    result = _compare_json(pair)
    if format_ == "text" and not result.differences:
        return None  # it differs only as text
    return result.with_note(f"the content type says {pair.left.media_type.essence}, and the bodies are JSON")


def _compare_documents(pair: BodyPair, format_: Format) -> BodyResult:
    if pair.is_over_budget(format_):
        if format_ in {"html", "xml"} and not pair.is_over_budget("text"):
            note = f"the {format_} is compared by its lines: parsing it is too much work"
            return _compare_documents(pair, "text")._replace(note=note)
        return BodyResult([pair.whole_difference("changed")], PARSE_OVER_BUDGET_NOTE, is_too_large=True)
    if format_ not in _DOCUMENT_PARSERS:
        return BodyResult([pair.whole_difference("changed")])
    root, parser = _DOCUMENT_PARSERS[format_]
    old, new = _try_parse(parser, pair.left), _try_parse(parser, pair.right)
    if (old is _PARSE_FAILED) != (new is _PARSE_FAILED):
        side = "old" if old is _PARSE_FAILED else "new"
        return BodyResult([pair.whole_difference("type")], f"{side}'s body is not valid {format_}")
    if old is _PARSE_FAILED and format_ == "text":
        return BodyResult([pair.whole_difference("changed")])
    if old is _PARSE_FAILED:
        return _compare_documents(pair, "text").with_note(f"neither body is valid {format_}")
    return _diff_documents(pair, old, new, root, pair.options.max_work - pair.cost(format_))


def _try_parse(parser: Callable[[DecodedBody], Any], side: DecodedBody) -> Any:
    try:
        return parser(side)
    except (ValueError, RecursionError):
        return _PARSE_FAILED


def _diff_documents(pair: BodyPair, old: Any, new: Any, root: str, max_work: int) -> BodyResult:
    values = old, new
    if isinstance(old, documents.Element):
        values = documents.to_documents(old, new)
        if old.tag != new.tag and root == "xml":
            values = {old.tag: values[0]}, {new.tag: values[1]}
    diff = JsonDiff(
        pair.options.max_differences,
        root=root,
        identity_lookup=pair.identity_lookup,
        classify=pair.classify,
        max_work=max_work,
    )
    try:
        differences = diff.compare(*values)
    except RecursionError:  # deeper than the parsers go
        differences = [pair.whole_difference("changed")]
    if not differences and isinstance(old, documents.Element) and not documents.has_same_order(old, new):
        differences = [whole_body_difference("order", pair.old, pair.new, root)]
    return _make_result(diff, [*_diff_encodings(pair), *differences])


def _diff_encodings(pair: BodyPair) -> list[Difference]:
    old, new = _detect_encoding(pair.left.data), _detect_encoding(pair.right.data)
    if old == new:
        return []
    impact: Impact = "breaking" if old == "utf-8" else "value"
    return [Difference.from_values("body", ENCODING_PATH, old, new, impact, ENCODING_PATH)]


def _detect_encoding(data: bytes) -> str:
    mark, name = find_byte_order_mark(data)
    if mark:
        return f"{name} with a byte order mark"
    return json.detect_encoding(data[:4]) if b"\0" in data[:4] else "utf-8"


def whole_body_difference(kind: Kind, old: Answer, new: Answer, path: str = "") -> Difference:
    impact: Impact = "value" if kind in {"added", "changed", "order"} else "breaking"
    old_preview = None if kind == "added" else render_preview(old)
    new_preview = None if kind == "removed" else render_preview(new)
    return Difference("body", path, kind, impact, RenderedValues(path, old_preview, new_preview))


def render_preview(answer: Answer) -> str:
    """Summarise a body for people, as JSON: type, the beginning of a text, length and digest."""
    body = answer.body
    format_ = sniff_format(body.content)
    content_type = parse_media_type(get_header(answer.headers, "content-type")).essence
    summary: dict[str, Any] = {"type": content_type[:PREVIEW_CHARS] or format_}
    if format_ != "bytes":
        summary["beginning"] = body.content[: 4 * PREVIEW_CHARS].decode("utf-8", "replace")[:PREVIEW_CHARS]
    return render_value(summary | {"length": body.length, "digest": body.fingerprint()})


class TruncatedResult(NamedTuple):
    differences: list[Difference]
    compared_part: str  # for people


class _ItemFormat(NamedTuple):
    name: str
    root: str  # first step of paths
    terminator: bytes  # ends an item; line ends are those of Unix
    parse: Callable[[bytes], list[Any]]  # raises ValueError


def _read_utf8_text(data: bytes) -> str:
    decoded_text = decode_text(data, "utf-8")
    if decoded_text is None or "\0" in decoded_text:
        raise ValueError("the body is not text in UTF-8")
    return decoded_text


_ITEM_FORMATS: dict[Format, _ItemFormat] = {
    "events": _ItemFormat("events", "events", b"\n\n", lambda data: documents.parse_sse(_read_utf8_text(data))),
    "ndjson": _ItemFormat("items", "$", b"\n", documents.parse_ndjson),
    "text": _ItemFormat("lines", "lines", b"\n", lambda data: documents.split_lines(_read_utf8_text(data))),
}


def compare_truncated(
    old: Answer,
    new: Answer,
    truncation: Truncation,
    options: CompareOptions,
    identity_lookup: IdentityLookup | None = None,
    classify: DifferenceClassifier | None = None,
) -> TruncatedResult:
    """Compare the parts of two responses that both captures have. A capture over its size limit is truncated too."""
    truncation = (truncation[0] or not old.body.is_complete, truncation[1] or not new.body.is_complete)
    common = min(
        len(side.body.content) for side, is_truncated in zip((old, new), truncation, strict=True) if is_truncated
    )
    if old.body.content[:common] == new.body.content[:common]:
        return TruncatedResult([], f"the first {common:,} bytes of both" if common else "no body had come yet")
    if any(name == "content-encoding" and value.lower() != "identity" for name, value in (*old.headers, *new.headers)):
        return TruncatedResult([], "not the bodies: a part of a compressed body can't be decoded")
    left, right = _attach_media_type(old, old.body.content), _attach_media_type(new, new.body.content)
    format_ = detect_format(left, right)
    if format_ != detect_format(right, left):
        return TruncatedResult([], "not the bodies: their formats differ")
    if format_ == "bytes" or {old.status, new.status} == {PARTIAL_CONTENT}:
        return TruncatedResult([whole_body_difference("changed", old, new)], f"the first {common:,} bytes of both")
    if format_ not in _ITEM_FORMATS or estimate_parse_cost(format_, left.data, right.data) > options.max_work:
        return TruncatedResult([], f"not the bodies: a part of {format_} can't be compared")
    item_format = _ITEM_FORMATS[format_]
    try:
        old_items, new_items = (
            _parse_items(item_format, side.data, is_truncated)
            for side, is_truncated in zip((left, right), truncation, strict=True)
        )
    except (ValueError, RecursionError):
        return TruncatedResult([], f"not the bodies: they have no valid {item_format.name}")
    common = min(
        len(items) for items, is_truncated in zip((old_items, new_items), truncation, strict=True) if is_truncated
    )
    diff = JsonDiff(options.max_differences, root=item_format.root, identity_lookup=identity_lookup, classify=classify)
    differences = diff.compare_by_index(old_items[:common], new_items[:common])
    compared_part = f"the first {common:,} {item_format.name} of both"
    return TruncatedResult(differences, "; ".join([compared_part, *describe_unlisted(diff)]))


def _parse_items(item_format: _ItemFormat, data: bytes, is_truncated: bool) -> list[Any]:
    """Parse the complete items."""
    if not is_truncated:
        return item_format.parse(data)
    unix_data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    complete_data, terminator, _ = unix_data.rpartition(item_format.terminator)
    items = item_format.parse(complete_data + terminator)
    # The last line is empty: the terminator starts a line that the capture doesn't have.
    return items[:-1] if item_format.name == "lines" else items
