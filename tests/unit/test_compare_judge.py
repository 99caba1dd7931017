"""From captures to an outcome."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.protocol.capture import Body, Capture, Headers, digest
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from captures import JSON, capture

RULES = CompareOptions()


def seen(judgement: ComparisonResult) -> list[tuple[str, str, str]]:
    return [(found.part, found.path, found.kind) for found in judgement.differences]


def compare(old: Capture, new: Capture) -> ComparisonResult:
    return compare_pair([old, new], RULES)


def test_equal_answers_match() -> None:
    judgement = compare(capture("old", {"a": 1}), capture("new", {"a": 1}, role="shadow"))

    assert (judgement.outcome, judgement.method, judgement.route) == ("match", "GET", "/products/{id}")


def test_bytes_that_mean_the_same_match() -> None:
    assert compare(capture("old", b'{"a": 1, "b": 2}'), capture("new", b'{"b":2,"a":1}')).outcome == "match"


def test_another_status_class_is_one_finding_and_hides_what_follows_from_it() -> None:
    judgement = compare(capture("old", {"a": 1}), capture("new", b"oops", status=500, headers=()))

    assert (judgement.outcome, seen(judgement)) == ("mismatch", [("status", "200->500", "changed")])
    assert judgement.differences[0].impact == "breaking"


def test_another_status_of_the_same_class_is_compared_on() -> None:
    judgement = compare(capture("old", {"a": 1}), capture("new", {"a": 2}, status=201))

    assert seen(judgement) == [("status", "200->201", "changed"), ("body", "$.a", "changed")]


def test_an_application_that_raised_before_it_answered_is_a_500() -> None:
    judgement = compare(capture("old", {"a": 1}), capture("new", status=0, raised="KeyError"))

    assert seen(judgement) == [("status", "200->500", "changed")]


def test_an_answer_that_broke_off_is_an_error() -> None:
    new = capture("new", b'{"a"', complete=False, raised="KeyError")

    assert seen(compare(capture("old", {"a": 1}), new)) == [("error", "unfinished", "removed")]


@pytest.mark.parametrize(
    ("status", "headers"), [(429, JSON), (503, (*JSON, ("retry-after", "1")))], ids=["429", "503 with retry-after"]
)
def test_shedding_load_is_an_outcome_of_its_own(status: int, headers: Headers) -> None:
    judgement = compare(capture("old", {}), capture("new", {}, status=status, headers=headers))

    assert (judgement.outcome, judgement.differences) == ("shed", ())


def test_a_copy_that_was_disturbed_says_nothing() -> None:
    """Also a second copy that old got."""
    reason = "a copy was disturbed in its database: LockNotAvailable"
    failed = capture("new", b"oops", status=500, role="shadow")
    judgement = compare(capture("old", {"a": 1}), msgspec.structs.replace(failed, invalid_reason=reason))
    noisy = msgspec.structs.replace(capture("old", {"a": 2}, role="baseline"), invalid_reason=reason)
    calm = compare_pair([capture("old", {"a": 1}), capture("new", {"a": 1}, role="shadow"), noisy], RULES)

    assert (judgement.outcome, judgement.reason, judgement.differences) == ("not_compared", reason, ())
    assert (calm.outcome, calm.noise) == ("match", ())


def test_a_plain_503_is_an_error_and_not_shedding() -> None:
    assert compare(capture("old", {}), capture("new", {}, status=503)).outcome == "mismatch"


def test_validators_belong_to_a_build() -> None:
    asked = (("if-none-match", '"abc"'),)
    judgement = compare(capture("old", status=304, asked=asked), capture("new", {"a": 1}, asked=asked))

    assert judgement.outcome == "not_compared"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((("cache-control", "max-age=60"),), (), [("cache-control", "removed")]),
        ((), (("x-new", "1"),), [("x-new", "added")]),
        ((("vary", "accept"),), (("vary", "cookie"),), [("vary", "changed")]),
        ((("date", "a"), ("x-request-id", "1"), ("x-envoy-upstream-service-time", "3")), (("date", "b"),), []),
        ((("server", "x"),), (), []),
        ((("etag", "1"), ("last-modified", "a")), (("last-modified", "b"),), []),
        ((("etag", "1"),), (), [("etag", "removed")]),
        ((), (("last-modified", "a"),), [("last-modified", "added")]),
        ((("link", "a"), ("link", "b")), (("link", "b"), ("link", "a")), [("link", "changed")]),
        ((("a", "1"), ("b", "2")), (("b", "2"), ("a", "1")), []),
        ((("set-cookie", "s=hmac:1; Path=/; HttpOnly"),), (("set-cookie", "s=hmac:2; httponly; path=/"),), []),
        ((("set-cookie", "s=hmac:1; Secure"),), (("set-cookie", "s=hmac:1"),), [("set-cookie[s]", "changed")]),
    ],
)
def test_headers(old: Headers, new: Headers, expected: list[tuple[str, str]]) -> None:
    judgement = compare(capture("old", headers=old), capture("new", headers=new))

    assert [(path, kind) for _, path, kind in seen(judgement)] == expected


def test_headers_can_be_declared_volatile() -> None:
    old, new = capture("old", headers=(("X-Node".lower(), "1"),)), capture("new", headers=(("x-node", "2"),))

    assert compare_pair([old, new], RULES).outcome == "mismatch"
    assert compare_pair([old, new], CompareOptions.with_ignored_headers(("X-Node",))).outcome == "match"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [(b"", b"{}", "added"), (b"{}", b"", "removed"), (b"{}", b"<html>", "type"), (b"a", b"b", "type")],
)
def test_bodies_that_are_no_json_on_both_sides(old: bytes, new: bytes, kind: str) -> None:
    judgement = compare(capture("old", old, headers=JSON), capture("new", new, headers=JSON))

    expected = "changed" if (old, new) == (b"a", b"b") else kind
    assert [found[2] for found in seen(judgement)] == [expected]


XML: Headers = (("content-type", "application/xml"),)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ((b'{"a": 1}', ()), (b'{"a": 2}', ()), "no content type: old and new"),
        ((b'{"a": 1}', JSON), (b'{"a": 2}', ()), "no content type: new"),
        ((b'{"a": 1}', XML), (b'{"a": 2}', XML), "the content type says application/xml, and the bodies are JSON"),
        ((b"a", JSON), (b"b", JSON), "the content type says JSON, and neither body is valid JSON"),
        ((b'{"a": 1}', JSON), (b'{"a": ', JSON), "new's body is not valid JSON"),
        ((b'{"a": 1}', JSON), (b'{"a": 2}', JSON), ""),
    ],
)
def test_a_content_type_that_is_missing_or_wrong_is_reported(
    old: tuple[bytes, Headers], new: tuple[bytes, Headers], reason: str
) -> None:
    (before, said), (after, says) = old, new
    judgement = compare(capture("old", before, headers=said), capture("new", after, headers=says))

    assert judgement.outcome == "mismatch"
    assert judgement.reason == reason


def test_json_deeper_than_any_reader_goes_is_compared_as_a_whole() -> None:
    deep, other = [b"[" * 900 + n + b"]" * 900 for n in (b"1", b"2")]

    assert seen(compare(capture("old", deep), capture("new", other))) == [("body", "", "changed")]


def test_json_of_many_levels_is_compared_by_paths() -> None:
    deep, other = [b"[" * 150 + n + b"]" * 150 for n in (b"1", b"2")]

    assert seen(compare(capture("old", deep), capture("new", other))) == [("body", "$" + "[*]" * 150, "changed")]


def test_text_is_compared_by_lines() -> None:
    text = (("content-type", "text/plain"),)
    judgement = compare(capture("old", b"[1]", headers=text), capture("new", b"[ 1 ]", headers=text))

    assert seen(judgement) == [("body", "lines[*]", "changed")]


def test_compressed_json_is_read() -> None:
    packed = (*JSON, ("content-encoding", "gzip"))
    old, new = ({"a": 1, "t": "x" * 100}, {"a": 2, "t": "x" * 100})
    judgement = compare(
        capture("old", gzip.compress(json.dumps(old).encode()), headers=packed),
        capture("new", gzip.compress(json.dumps(new).encode()), headers=packed),
    )

    assert seen(judgement) == [("body", "$.a", "changed")]


def test_a_decompression_bomb_is_compared_by_its_bytes() -> None:
    packed = (*JSON, ("content-encoding", "gzip"))
    bombs = [gzip.compress(bytes([n]) * 10_000_000) for n in (48, 49)]
    judgement = compare_pair(
        [capture("old", bombs[0], headers=packed), capture("new", bombs[1], headers=packed)],
        CompareOptions(max_decoded_bytes=100_000),
    )

    assert seen(judgement) == [("body", "", "changed")]


def cut(version: Any, whole: bytes) -> Capture:
    made = capture(version)
    answer = made.answer.__class__(200, JSON, Body(content=whole[:10], length=len(whole), digest=digest(whole)))
    return Capture(pair=made.pair, service="shop", version=version, role="live", request=made.request, answer=answer)


def test_a_cut_body_is_compared_by_its_digest() -> None:
    assert compare(cut("old", b"a" * 100), cut("new", b"a" * 100)).outcome == "match"
    assert compare(cut("old", b"a" * 100), cut("new", b"a" * 99 + b"b")).outcome == "oversize"
    assert seen(compare(cut("old", b"a" * 100), cut("new", b"a" * 99 + b"b"))) == [("body", "", "changed")]


OLD, NEW = capture("old", {"a": 1}), capture("new", {"a": 1}, role="shadow")
AGAIN = capture("old", {"a": 2}, role="baseline")


@pytest.mark.parametrize(
    ("captures", "timed_out", "outcome"),
    [
        ([OLD, NEW], False, "match"),
        ([OLD], True, "only_old"),
        ([NEW], True, "only_new"),
        ([OLD, AGAIN], True, "only_old"),
        ([OLD, capture("old", {"a": 1}, role="shadow")], False, "baseline_only"),
        ([capture("old", {"a": 1}, role="shadow"), capture("old", {"a": 1}, attempt=2)], True, "only_old"),
        ([capture("new", {"a": 1}), capture("old", {"a": 1}, role="shadow")], False, "match"),
        ([capture("new", status=503), capture("old", {"a": 1}, attempt=2)], False, "mismatch"),
    ],
)
def test_which_copies_there_are_decides_first(captures: Sequence[Capture], timed_out: bool, outcome: str) -> None:
    for order in permutations(captures):
        assert compare_pair(order, RULES, timed_out=timed_out).outcome == outcome


def test_a_baseline_copy_shows_what_differs_by_itself() -> None:
    judgement = compare_pair([OLD, NEW, AGAIN], RULES)

    assert judgement.outcome == "match"
    assert judgement.baseline_compared
    assert [found.path for found in judgement.noise] == ["$.a"]


@pytest.mark.parametrize(
    ("path", "route", "expected"),
    [
        ("/products/7", "/products/{id:int}", "/products/{id}"),
        ("/products/7", "", "/products/{id}"),
        ("/u/0d7c1e3a-0000-4000-8000-000000000001/cart", "", "/u/{id}/cart"),
        ("/search", "", "/search"),
        ("/", "", "/"),
        ("/v2/iphone-15", "", "/v2/iphone-15"),
    ],
)
def test_the_endpoint(path: str, route: str, expected: str) -> None:
    judgement = compare(capture("old", path=path, route=route), capture("new", path=path, route=route))

    assert judgement.route == expected


def test_old_names_the_endpoint_where_the_versions_disagree() -> None:
    judgement = compare(capture("old", route="/p/{id}"), capture("new", route="/p/{product_id}"))

    assert judgement.route == "/p/{id}"


def test_unknown_paths_are_one_endpoint() -> None:
    judgement = compare(
        capture("old", path="/.env", route="", status=404), capture("new", path="/.env", route="", status=404)
    )

    assert judgement.route == "(no route)"


@given(
    st.binary(max_size=200),
    st.binary(max_size=200),
    st.sampled_from(["application/json", "text/html", "", "rubbish/;;"]),
)
def test_any_bytes_can_be_judged(old: bytes, new: bytes, kind: str) -> None:
    headers = (("content-type", kind),)
    judgement = compare(capture("old", old, headers=headers), capture("new", new, headers=headers))

    assert judgement.outcome in {"match", "mismatch"}
    assert judgement.outcome == "match" or old != new


@pytest.mark.parametrize("name", ["link", "www-authenticate", "content-disposition", "location", "set-cookie"])
@pytest.mark.parametrize("text", ["<", '"', ";", ",", "<a>; ", '="', "%", "<a>;b;", '"\\'])
def test_a_header_of_one_sign_costs_no_more_than_its_length(name: str, text: str) -> None:
    """A second, where each is looked at as often as there are others, would be a minute."""
    long = text * (50_000 // len(text))
    began = time.process_time()
    compare(capture("old", headers=((name, long),)), capture("new", headers=((name, long + "a"),)))

    assert time.process_time() - began < 1
