"""Compressed, damaged and malicious bodies."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
import sys
import zlib
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from abreast.protocol.capture import Headers
from abreast_sidecar.compare.content import decode_content, parse_media_type
from abreast_sidecar.compare.documents import DocumentError, read_html, read_xml
from abreast_sidecar.compare.json_diff import MAX_EAGER_DEPTH, MAX_MATCHED_ARRAY_DEPTH, JsonDiff, match_elements
from abreast_sidecar.compare.model import ComparisonResult, is_map
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions, Rule
from support_captures import capture

LIMIT = 1_000_000
KINDS = [
    "application/json",
    "application/x-ndjson",
    "text/event-stream",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=b",
    "text/html",
    "application/xml",
    "text/plain; charset=latin-1",
    "image/png",
    "application/octet-stream",
    "",
    "rubbish/;;",
]


def compare(old: bytes, new: bytes, kind: str = "application/json", coding: str = "") -> ComparisonResult:
    headers: Headers = (("content-type", kind),) if kind else ()
    if coding:
        headers = (*headers, ("content-encoding", coding))
    return compare_pair([capture("old", old, headers=headers), capture("new", new, headers=headers)], CompareOptions())


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def streamed_zstd(data: bytes) -> bytes:
    """Compress without the size in the frame header."""
    packer = zstandard.ZstdCompressor().compressobj()
    return bytes(packer.compress(data) + packer.flush())


PACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "two gzip members": ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.compress),
    "streamed zstd": ("zstd", streamed_zstd),
    "one over another": ("gzip, zstd", lambda data: zstandard.compress(gzip.compress(data))),
}


@pytest.mark.parametrize(("coding", "pack"), PACKED.values(), ids=PACKED)
def test_decode_content_restores_the_body(coding: str, pack: Callable[[bytes], bytes]) -> None:
    data = random.Random(1).randbytes(300_000) + bytes(300_000)

    assert decode_content(pack(data), coding, LIMIT).data == data


@pytest.mark.parametrize(("coding", "pack"), PACKED.values(), ids=PACKED)
def test_decode_content_stops_at_its_limit(coding: str, pack: Callable[[bytes], bytes]) -> None:
    body = pack(bytes(5_000_000))
    result = decode_content(body, coding, 100_000)

    assert (result.problem, result.data) == ("too large", body)


@pytest.mark.parametrize(("coding", "pack"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_decode_content_detects_truncated_streams(coding: str, pack: Callable[[bytes], bytes], share: float) -> None:
    body = pack(random.Random(1).randbytes(300_000))

    assert decode_content(body[: int(len(body) * share)], coding, LIMIT).problem == "corrupt"


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "zstd", "br", "gzip, gzip", "x" * 50, ",,"]))
def test_decode_content_never_raises(body: bytes, coding: str) -> None:
    result = decode_content(body, coding, LIMIT)

    assert result.data == body or not result.problem


def test_brotli_body_is_decoded_up_to_the_limit() -> None:
    pack = importlib.import_module("brotli").compress
    old, new, bomb = (pack(body) for body in (b'{"a": 1}', b'{"a": 2}', b"a" * 20_000_000))

    assert [difference.path for difference in compare(old, new, "application/json", coding="br").differences] == ["$.a"]
    assert compare(bomb, old, coding="br").outcome == "oversize"
    assert decode_content(old[:-2], "br", LIMIT).problem


def test_brotli_body_without_package_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    result = compare(b"one", b"two", coding="br")

    assert result.outcome == "not_compared"
    assert result.reason == "content-encoding br can't be decoded: old and new"


def test_gzip_body_of_many_members_is_oversize() -> None:
    member = gzip.compress(b"a")

    assert compare(member * 2000, member * 2000 + gzip.compress(b"b"), coding="gzip").outcome == "oversize"


def test_decompression_bomb_is_oversize() -> None:
    old, new = (gzip.compress(byte * 20_000_000) for byte in (b"a", b"b"))
    result = compare(old, new, coding="gzip")

    assert result.outcome == "oversize"
    assert result.reason == "a compressed body is larger than the decoding limit: old and new"


@pytest.mark.parametrize("kind", KINDS)
@given(old=st.binary(max_size=200), new=st.binary(max_size=200))
def test_compare_accepts_any_bytes_of_any_type(kind: str, old: bytes, new: bytes) -> None:
    result = compare(old, new, kind)

    assert result.outcome == "mismatch" or (result.outcome == "match" and not result.differences)
    assert compare(old, old, kind).outcome == "match"
    assert {difference.path for difference in compare(new, old, kind).differences} == {
        difference.path for difference in result.differences
    }


PIECES = ["<p>", "</p>", "<a href='x'>", '<b c="', ">", "<!--", "-->", "<script>", "</script>", "&amp;", "&#9", "x", "<", "\0", "<!", "</", "<x/>", "'"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=60), st.lists(st.sampled_from(PIECES), max_size=60))
def test_compare_accepts_any_sequence_of_tags(old: list[str], new: list[str]) -> None:
    forward = compare("".join(old).encode(), "".join(new).encode(), "text/html")
    backward = compare("".join(new).encode(), "".join(old).encode(), "text/html")

    assert {difference.path for difference in forward.differences} == {
        difference.path for difference in backward.differences
    }


@pytest.mark.parametrize("piece", [*PIECES, "<a ", "<a b='", "<p><a>", "&#99999999999", "<title>", "<td>"])
def test_read_html_takes_linear_time(piece: str) -> None:
    """Count calls: a quadratic reader exceeds the bound."""
    text = piece * 20_000
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        read_html(text)
    except (DocumentError, ValueError):
        pass
    finally:
        sys.setprofile(None)

    assert calls < 40 * 20_000


def test_read_xml_refuses_entity_declarations() -> None:
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]><a>&c;</a>'

    with pytest.raises(DocumentError):
        read_xml(bomb)


def test_read_xml_does_not_open_files(tmp_path: Any) -> None:
    (tmp_path / "secret").write_text("secret")
    text = f'<!DOCTYPE a SYSTEM "{(tmp_path / "secret").as_uri()}"><a>1</a>'

    assert read_xml(text).texts == ["1"]


@pytest.mark.parametrize("reader", [read_html, read_xml])
def test_markup_readers_refuse_deep_nesting(reader: Callable[[str], Any]) -> None:
    with pytest.raises(DocumentError):
        reader("<a>" * 10_000 + "</a>" * 10_000)


def work(old: Any, new: Any) -> int:
    diff = JsonDiff(200)
    diff.compare(old, new)
    return diff.work


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    items = [{"id": n, "v": n % 7, "t": f"text {n}"} for n in range(count)]
    random.Random(seed).shuffle(items)
    return items


def nested(levels: int, width: int, leaf: int) -> Any:
    value: Any = leaf
    for _ in range(levels):
        value = [*range(width), value]
    return value


def objects(levels: int, width: int, leaf: float) -> Any:
    value: Any = leaf
    for _ in range(levels):
        value = {"many": list(range(width)), "next": value}
    return value


SHAPES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "a shuffled list of objects": lambda n: (rows(n, 1), rows(n, 2)),
    "a shuffled list whose objects all differ": lambda n: (rows(n, 1), [{**row, "v": 9} for row in rows(n, 2)]),
    "a list of nothing in common": lambda n: (list(range(n)), list(range(n, 2 * n))),
    "a list against half of it": lambda n: (list(range(n)), list(range(0, n, 2))),
    "equal elements": lambda n: ([1] * n, [1] * (n // 2)),
    "objects without names": lambda n: ([{"v": k} for k in range(n)], [{"v": -k} for k in range(n)]),
    "a large map": lambda n: ({f"k{k}": k for k in range(n)}, {f"k{k}": -k for k in range(n)}),
    "keys of nothing in common": lambda n: ({f"k{k}": k for k in range(n)}, {f"q{k}": k for k in range(n)}),
    "lists in lists": lambda n: (nested(150, n // 150, 1), nested(150, n // 150, 2)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_json_diff_work_grows_linearly(shape: Callable[[int], tuple[Any, Any]]) -> None:
    small, large = work(*shape(3000)), work(*shape(24_000))

    assert large <= 8.5 * small + 100


def serialised(monkeypatch: pytest.MonkeyPatch, old: Any, new: Any) -> int:
    """Count the bytes that the comparison serialises."""
    total = 0

    def dump_and_record(*arguments: Any) -> bytes:
        nonlocal total
        content = orjson.dumps(*arguments)
        total += len(content)
        return content

    monkeypatch.setattr("abreast_sidecar.compare.values.dumps", dump_and_record)
    JsonDiff(200).compare(old, new)
    return total


def test_json_diff_serialises_elements_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = nested(150, 200, 1), nested(150, 200, 2)

    assert 0 < serialised(monkeypatch, old, new) <= MAX_MATCHED_ARRAY_DEPTH * 2 * len(json.dumps(old))


def test_json_diff_serialises_members_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = objects(150, 200, 1), objects(150, 200, 1.0)  # equal in Python, not in JSON

    assert 0 < serialised(monkeypatch, old, new) <= MAX_EAGER_DEPTH * 4 * len(json.dumps(old))


@pytest.mark.parametrize(
    ("old", "new", "pairs", "removed", "added", "moved", "by"),
    [
        ([1, 2], [1, 2], [], [], [], False, ""),
        ([{"id": 1, "v": 1}], [{"id": 1, "v": 2}], [(0, 0)], [], [], False, ""),
        ([{"id": 1}, {"id": 2}], [{"id": 2}, {"id": 1}], [], [], [], True, "id"),
        ([{"id": 1, "v": 1}, {"id": 2, "v": 1}], [{"id": 2, "v": 9}, {"id": 1, "v": 9}], [(0, 1), (1, 0)], [], [], True, "id"),
        ([{"id": 1, "v": 1}, {"id": 2, "v": 1}], [{"id": 2, "v": 9}], [(1, 0)], [0], [], False, ""),
        ([{"id": 1, "v": 1}, {"id": 2, "v": 1}], [{"id": 3, "v": 1}, {"id": 4, "v": 1}], [(0, 0), (1, 1)], [], [], False, ""),
        ([{"id": 1, "v": 1}, {"id": 2, "v": 1}], [{"id": 1, "v": 2}, {"id": 4, "v": 1}], [(0, 0), (1, 1)], [], [], False, ""),
        ([{"id": 1, "v": 1}, {"id": 2, "v": 1}], [{"id": 1, "v": 2}, {"id": 4, "v": 2}], [(0, 0)], [1], [1], False, ""),
        ([{"x": 1}, {"x": 2}], [{"x": 2}, {"x": 1}], [], [], [], True, ""),
        ([{"order_id": 1, "v": 1}, {"order_id": 2, "v": 1}], [{"order_id": 2, "v": 0}, {"order_id": 1, "v": 0}], [(0, 1), (1, 0)], [], [], True, "order_id"),
        ([{"name": "x", "v": 1}, {"name": "x", "v": 2}], [{"name": "x", "v": 2}, {"name": "x", "v": 1}], [], [], [], True, ""),
    ],
)  # fmt: skip
def test_match_elements_pairs_elements(
    old: Any, new: Any, pairs: Any, removed: Any, added: Any, moved: Any, by: Any
) -> None:
    result = match_elements(old, new)

    assert (
        sorted(result.pairs),
        list(result.removed),
        list(result.added),
        result.is_reordered,
        result.identity_field,
    ) == (pairs, removed, added, moved, by)


def test_reordered_array_hints_at_a_keyed_by_rule() -> None:
    result = JsonDiff(10).compare([{"sku": "a"}, {"sku": "b"}], [{"sku": "b"}, {"sku": "a"}])

    assert [(difference.kind, difference.hint) for difference in result] == [("order", "keyed-by sku")]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"1": 0, "2": 0}, {"1": 0}, False),
        ({"x": {"a": 1, "b": 2}}, {"x": {"a": 1, "b": 2}}, False),
        ({f"name {n}": {"a": n, "b": 2} for n in range(8)}, {"name 1": {"a": 1, "b": 2}}, True),
        ({chr(97 + n): {"a": n, "b": 2} for n in range(7)}, {}, False),
        ({chr(97 + n): {"a": n, "b": 2} for n in range(8)}, {}, True),
        ({chr(97 + n): {chr(97 + n): n} for n in range(20)}, {}, False),
        ({chr(97 + n): n for n in range(26)}, {}, False),
        ({f"w{chr(97 + n % 26)}{chr(97 + n // 26)}": n for n in range(60)}, {}, True),
        ({"2031-01-01": 1, "2031-01-02": 1, "2031-01-03": 1}, {"2031-01-01": 1}, True),
        ({"user:1": 1, "user:2": 1, "user:3": 1}, {}, True),
        ({"user:1": 1, "user:2": 1}, {"user:3": 1}, True),
        ({"user:1": 1, "user:2": 1, "total": 2}, {}, False),
        ({"p50": 1, "p95": 1, "p99": 1}, {"p50": 1, "p95": 1, "p99": 2}, False),
        ({"md5": "a", "sha1": "b", "sha256": "c"}, {}, False),
        ({"line_1": "a", "line_2": "b", "line_3": "c"}, {}, False),
        ({f"row{n}": n for n in range(7)}, {}, False),
        ({f"row{n}": n for n in range(8)}, {}, True),
        ({f"row_{n}": n for n in range(8)}, {"row_9": 1}, True),
        ({f"row{n}": n for n in range(8)}, {"total": 1}, False),
    ],
)
def test_is_map_detects_ids_as_keys(old: Any, new: Any, expected: bool) -> None:
    assert is_map(old, new) == is_map(new, old) == expected


def test_few_numbered_keys_are_fields_that_a_rule_names() -> None:
    (difference,) = JsonDiff(10).compare({"l": {"p50": 1, "p95": 2, "p99": 3}}, {"l": {"p50": 1, "p95": 2, "p99": 4}})

    assert difference.path == difference.exact_path == "$.l.p99"
    assert Rule("tail", "ignore", path="$.l.p99").explains(difference)


@pytest.mark.parametrize(
    ("text", "essence", "kind"),
    [
        ("", "", "unknown"),
        ("Application/JSON ; charset=x", "application/json", "json"),
        ("application/problem+json", "application/problem+json", "json"),
        ("image/svg+xml", "image/svg+xml", "xml"),
        ("text/css", "text/css", "text"),
        ("video/mp4", "video/mp4", "bytes"),
        (";;;", "", "unknown"),
    ],
)
def test_parse_media_type_detects_the_format(text: str, essence: str, kind: str) -> None:
    assert (parse_media_type(text).essence, parse_media_type(text).format) == (essence, kind)


def test_difference_can_be_pickled_copied_and_hashed() -> None:
    import copy
    import pickle

    result = JsonDiff(10).compare({"a": [1]}, {"a": [2]})[0]

    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301  # own data
    assert copy.deepcopy(result) == result
    assert hash(result) == hash(copy.copy(result))
    assert result.to_record()["exact_path"] == "$.a[0]"


def test_binary_bodies_are_compared_by_digest() -> None:
    result = compare(os.urandom(1_000_000), os.urandom(1_000_000), "application/octet-stream")

    assert json.loads(result.differences[0].old or "")["length"] == 1_000_000
