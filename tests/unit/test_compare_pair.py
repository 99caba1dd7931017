"""The outcome of a pair of captures."""

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
from abreast_sidecar.compare.rules import CompareOptions, Rule, RuleSet
from abreast_sidecar.compare.volatile import is_explained_by_shape
from support_captures import JSON, capture

RULES = CompareOptions()


def list_differences(result: ComparisonResult) -> list[tuple[str, str, str]]:
    return [(difference.part, difference.path, difference.kind) for difference in result.differences]


def compare(old: Capture, new: Capture) -> ComparisonResult:
    return compare_pair([old, new], RULES)


def test_equal_answers_match() -> None:
    result = compare(capture("old", {"a": 1}), capture("new", {"a": 1}, role="shadow"))

    assert (result.outcome, result.method, result.route) == ("match", "GET", "/products/{id}")


def test_equal_json_in_other_notation_matches() -> None:
    assert compare(capture("old", b'{"a": 1, "b": 2}'), capture("new", b'{"b":2,"a":1}')).outcome == "match"


def test_other_status_class_hides_all_other_differences() -> None:
    result = compare(capture("old", {"a": 1}), capture("new", b"oops", status=500, headers=()))

    assert (result.outcome, list_differences(result)) == ("mismatch", [("status", "200->500", "changed")])
    assert result.differences[0].impact == "breaking"


def test_other_status_of_one_class_is_compared_further() -> None:
    result = compare(capture("old", {"a": 1}), capture("new", {"a": 2}, status=201))

    assert list_differences(result) == [("status", "200->201", "changed"), ("body", "$.a", "changed")]


def test_exception_before_the_answer_counts_as_500() -> None:
    result = compare(capture("old", {"a": 1}), capture("new", status=0, exception="KeyError"))

    assert list_differences(result) == [("status", "200->500", "changed")]


def test_broken_off_answer_is_unfinished() -> None:
    new = capture("new", b'{"a"', complete=False, exception="KeyError")

    assert list_differences(compare(capture("old", {"a": 1}), new)) == [("error", "unfinished", "removed")]


@pytest.mark.parametrize(
    ("status", "headers"), [(429, JSON), (503, (*JSON, ("retry-after", "1")))], ids=["429", "503 with retry-after"]
)
def test_load_shedding_has_its_own_outcome(status: int, headers: Headers) -> None:
    result = compare(capture("old", {}), capture("new", {}, status=status, headers=headers))

    assert (result.outcome, result.differences) == ("shed", ())


def test_invalid_capture_is_not_compared() -> None:
    reason = "a copy was disturbed in its database: LockNotAvailable"
    failed = capture("new", b"oops", status=500, role="shadow")
    result = compare(capture("old", {"a": 1}), msgspec.structs.replace(failed, invalid_reason=reason))
    noisy = msgspec.structs.replace(capture("old", {"a": 2}, role="baseline"), invalid_reason=reason)
    calm = compare_pair([capture("old", {"a": 1}), capture("new", {"a": 1}, role="shadow"), noisy], RULES)

    assert (result.outcome, result.reason, result.differences) == ("not_compared", reason, ())
    assert (calm.outcome, calm.noise) == ("match", ())


def test_503_without_retry_after_is_a_mismatch() -> None:
    assert compare(capture("old", {}), capture("new", {}, status=503)).outcome == "mismatch"


def test_conditional_request_is_not_compared() -> None:
    headers = (("if-none-match", '"abc"'),)
    result = compare(
        capture("old", status=304, request_headers=headers), capture("new", {"a": 1}, request_headers=headers)
    )

    assert result.outcome == "not_compared"


DIGEST = f"hmac:{'a' * 8}:{'b' * 32}"
EXPIRES_2031 = (("set-cookie", "s=1; Expires=Wed, 01 Jan 2031 00:00:00 GMT"),)


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
        ((("expires", "-1"),), (), [("expires", "removed")]),
        ((("expires", "-1"),), (("expires", "Thu, 01 Jan 1970 00:00:00 GMT"),), []),
        ((("expires", "-1"),), (("expires", "Wed, 01 Jan 2031 00:00:00 GMT"),), [("expires", "format")]),
        ((("expires", "Wed, 01 Jan 2031 00:00:00 GMT"),), (("expires", "Wed, 01 Jan 2031 00:00:09 GMT"),), []),
        ((("expires", "-1"), ("cache-control", "max-age=0")), (("cache-control", "max-age=0"),), []),
        ((("link", "a"), ("link", "b")), (("link", "b"), ("link", "a")), [("link", "changed")]),
        ((("a", "1"), ("b", "2")), (("b", "2"), ("a", "1")), []),
        ((("set-cookie", "s=hmac:1; Path=/; HttpOnly"),), (("set-cookie", "s=hmac:2; httponly; path=/"),), []),
        ((("set-cookie", "s=hmac:1; Secure"),), (("set-cookie", "s=hmac:1"),), [("set-cookie[s]", "changed")]),
        ((("set-cookie", "s=hmac:1"),), (("set-cookie", "s=undefined"),), [("set-cookie[s]", "changed")]),
        ((("set-cookie", f"s={DIGEST}.{DIGEST}"),), (("set-cookie", f"s={DIGEST}"),), [("set-cookie[s]", "changed")]),
        ((("set-cookie", f"s=abc.{'x' * 27}"),), (("set-cookie", f"s=def.{'y' * 27}"),), []),
        (EXPIRES_2031, (("set-cookie", "s=2; Expires=Wed, 01 Jan 2031 00:00:09 GMT"),), []),
        (EXPIRES_2031, (("set-cookie", "s=2; Expires=Sun, 01 Jan 2040 00:00:09 GMT"),), [("set-cookie[s]", "changed")]),
        (EXPIRES_2031, (("set-cookie", "s=2; Expires=Thu, 01 Jan 1970 00:00:00 GMT"),), [("set-cookie[s]", "changed")]),
        (EXPIRES_2031, (("set-cookie", "s=2; Expires=soon"),), [("set-cookie[s]", "changed")]),
        (
            (("set-cookie", "s=1; expires=Thu, 01 Jan 99999999999999 00:00:00 GMT"),),
            (("set-cookie", "s=1; expires=Thu, 01 Jan 2031 99999999999:00:00 GMT"),),
            [],
        ),
        (
            (("set-cookie", "s=1; a=expires=2031-99-99T00:00:00"),),
            (("set-cookie", "s=1; a=expires=2031-99-99T00:00:01"),),
            [("set-cookie[s]", "changed")],
        ),
        ((("x-ratelimit-limit", "100"),), (("x-ratelimit-limit", "10"),), [("x-ratelimit-limit", "changed")]),
        ((("x-amz-meta-owner", "a"),), (("x-amz-meta-owner", "b"),), [("x-amz-meta-owner", "changed")]),
    ],
)
def test_headers_are_compared_by_meaning(old: Headers, new: Headers, expected: list[tuple[str, str]]) -> None:
    result = compare(capture("old", headers=old), capture("new", headers=new))

    assert [(path, kind) for _, path, kind in list_differences(result)] == expected


@pytest.mark.parametrize(
    ("old", "new", "impact"),
    [
        ("public, max-age=60", None, "value"),
        ("max-age=0", None, "value"),
        ("Private, max-age=60", None, "breaking"),
        ("no-store", None, "breaking"),
        ('private="set-cookie"', "public", "breaking"),
        ("no-store", "private", "value"),
        ("public", "no-store", "value"),
        (None, "public", "value"),
    ],
)
def test_cache_control_breaks_clients_if_it_no_longer_restricts_caches(
    old: str | None, new: str | None, impact: str
) -> None:
    old_headers, new_headers = ((("cache-control", value),) if value else () for value in (old, new))

    (difference,) = compare(capture("old", headers=old_headers), capture("new", headers=new_headers)).differences

    assert (difference.path, difference.impact) == ("cache-control", impact)


@pytest.mark.parametrize(("origin", "impact"), [((), "value"), ((("origin", "https://a.example"),), "breaking")])
def test_lost_cors_header_breaks_only_requests_with_an_origin(origin: Headers, impact: str) -> None:
    old = capture("old", headers=(("access-control-allow-origin", "*"),), request_headers=origin)
    (difference,) = compare(old, capture("new", headers=(), request_headers=origin)).differences

    assert (difference.path, difference.kind, difference.impact) == ("access-control-allow-origin", "removed", impact)


def test_lost_compression_breaks_no_client() -> None:
    old = capture("old", headers=(("content-encoding", "gzip"), ("x-a", "1")))

    differences = compare(old, capture("new", headers=())).differences

    assert {difference.path: difference.impact for difference in differences} == {
        "content-encoding": "value",
        "x-a": "breaking",
    }


def test_ignored_headers_are_not_compared() -> None:
    old, new = capture("old", headers=(("X-Node".lower(), "1"),)), capture("new", headers=(("x-node", "2"),))

    assert compare_pair([old, new], RULES).outcome == "mismatch"
    assert compare_pair([old, new], CompareOptions.with_ignored_headers(("X-Node",))).outcome == "match"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [(b"", b"{}", "added"), (b"{}", b"", "removed"), (b"{}", b"<html>", "type"), (b"a", b"b", "type")],
)
def test_invalid_json_bodies_report_added_removed_or_type(old: bytes, new: bytes, kind: str) -> None:
    result = compare(capture("old", old, headers=JSON), capture("new", new, headers=JSON))

    expected = "changed" if (old, new) == (b"a", b"b") else kind
    assert [difference[2] for difference in list_differences(result)] == [expected]


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
def test_missing_or_wrong_content_type_is_noted(
    old: tuple[bytes, Headers], new: tuple[bytes, Headers], reason: str
) -> None:
    (old_body, old_headers), (new_body, new_headers) = old, new
    result = compare(capture("old", old_body, headers=old_headers), capture("new", new_body, headers=new_headers))

    assert result.outcome == "mismatch"
    assert result.reason == reason


def test_json_beyond_parser_depth_is_compared_as_a_whole() -> None:
    deep, other = [b"[" * 900 + n + b"]" * 900 for n in (b"1", b"2")]

    assert list_differences(compare(capture("old", deep), capture("new", other))) == [("body", "", "changed")]


def test_deep_json_is_compared_by_paths() -> None:
    deep, other = [b"[" * 150 + n + b"]" * 150 for n in (b"1", b"2")]

    assert list_differences(compare(capture("old", deep), capture("new", other))) == [
        ("body", "$" + "[*]" * 150, "changed")
    ]


def test_text_is_compared_by_lines() -> None:
    text = (("content-type", "text/plain"),)
    result = compare(capture("old", b"[1]", headers=text), capture("new", b"[ 1 ]", headers=text))

    assert list_differences(result) == [("body", "lines[*]", "changed")]


def test_compressed_json_is_compared_by_paths() -> None:
    packed = (*JSON, ("content-encoding", "gzip"))
    old, new = ({"a": 1, "t": "x" * 100}, {"a": 2, "t": "x" * 100})
    result = compare(
        capture("old", gzip.compress(json.dumps(old).encode()), headers=packed),
        capture("new", gzip.compress(json.dumps(new).encode()), headers=packed),
    )

    assert list_differences(result) == [("body", "$.a", "changed")]


def test_decompression_bomb_is_compared_by_bytes() -> None:
    packed = (*JSON, ("content-encoding", "gzip"))
    bombs = [gzip.compress(bytes([n]) * 10_000_000) for n in (48, 49)]
    result = compare_pair(
        [capture("old", bombs[0], headers=packed), capture("new", bombs[1], headers=packed)],
        CompareOptions(max_decoded_bytes=100_000),
    )

    assert list_differences(result) == [("body", "", "changed")]


def truncated(version: Any, content: bytes) -> Capture:
    result = capture(version)
    answer = result.answer.__class__(200, JSON, Body(content=content[:10], length=len(content), digest=digest(content)))
    return Capture(
        pair=result.pair, service="shop", version=version, role="live", request=result.request, answer=answer
    )


def test_body_over_the_capture_limit_is_compared_by_digest() -> None:
    assert compare(truncated("old", b"a" * 100), truncated("new", b"a" * 100)).outcome == "match"
    assert compare(truncated("old", b"a" * 100), truncated("new", b"a" * 99 + b"b")).outcome == "oversize"
    assert list_differences(compare(truncated("old", b"a" * 100), truncated("new", b"a" * 99 + b"b"))) == [
        ("body", "", "changed")
    ]


OLD, NEW = capture("old", {"a": 1}), capture("new", {"a": 1}, role="shadow")
AGAIN = capture("old", {"a": 2}, role="baseline")


@pytest.mark.parametrize(
    ("captures", "timed_out", "outcome"),
    [
        ([OLD, NEW], False, "match"),
        ([OLD], True, "only_old"),
        ([capture("old", {"a": 1}, client_left=True)], True, "aborted"),
        ([capture("new", {"a": 1}, client_left=True)], True, "aborted"),
        ([capture("old", {"a": 1}, client_left=True, role="shadow")], True, "only_old"),
        ([NEW], True, "only_new"),
        ([OLD, AGAIN], True, "only_old"),
        ([OLD, capture("old", {"a": 1}, role="shadow")], False, "baseline_only"),
        ([capture("old", {"a": 1}, role="shadow"), capture("old", {"a": 1}, attempt=2)], True, "only_old"),
        ([capture("new", {"a": 1}), capture("old", {"a": 1}, role="shadow")], False, "match"),
        ([capture("new", status=503), capture("old", {"a": 1}, attempt=2)], False, "mismatch"),
    ],
)
def test_available_captures_decide_the_outcome(captures: Sequence[Capture], timed_out: bool, outcome: str) -> None:
    for order in permutations(captures):
        assert compare_pair(order, RULES, timed_out=timed_out).outcome == outcome


def test_baseline_yields_noise() -> None:
    result = compare_pair([OLD, NEW, AGAIN], RULES)

    assert result.outcome == "match"
    assert result.baseline_compared
    assert [difference.path for difference in result.noise] == ["$.a"]


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
def test_endpoint_is_the_route_or_generalised_path(path: str, route: str, expected: str) -> None:
    result = compare(capture("old", path=path, route=route), capture("new", path=path, route=route))

    assert result.route == expected


def test_endpoint_uses_the_route_of_old() -> None:
    result = compare(capture("old", route="/p/{id}"), capture("new", route="/p/{product_id}"))

    assert result.route == "/p/{id}"


def test_unknown_paths_share_one_endpoint() -> None:
    result = compare(
        capture("old", path="/.env", route="", status=404), capture("new", path="/.env", route="", status=404)
    )

    assert result.route == "(no route)"


@given(
    st.binary(max_size=200),
    st.binary(max_size=200),
    st.sampled_from(["application/json", "text/html", "", "rubbish/;;"]),
)
def test_compare_pair_accepts_any_bytes(old: bytes, new: bytes, kind: str) -> None:
    headers = (("content-type", kind),)
    result = compare(capture("old", old, headers=headers), capture("new", new, headers=headers))

    assert result.outcome in {"match", "mismatch"}
    assert result.outcome == "match" or old != new


@pytest.mark.parametrize("name", ["link", "www-authenticate", "content-disposition", "location", "set-cookie"])
@pytest.mark.parametrize("text", ["<", '"', ";", ",", "<a>; ", '="', "%", "<a>;b;", '"\\'])
def test_headers_are_parsed_in_linear_time(name: str, text: str) -> None:
    """A quadratic parser takes a minute."""
    long = text * (50_000 // len(text))
    start = time.process_time()
    compare(capture("old", headers=((name, long),)), capture("new", headers=((name, long + "a"),)))

    assert time.process_time() - start < 1


FRESH_ID = "9b1deb4d-3b7d-4bad-9bdd-{:012x}"
FIELD_NAMES = "abcdefghij"


def make_rows(start: int, count: int) -> list[dict[str, str]]:
    return [
        {name: FRESH_ID.format(start + 100 * row + n) for n, name in enumerate(FIELD_NAMES)} for row in range(count)
    ]


def compare_bodies_of(old: Any, new: Any, rules: RuleSet | None = None) -> ComparisonResult:
    return compare_pair([capture("old", old), capture("new", new)], CompareOptions(rule_set=rules))


def test_removed_field_is_reported_after_hundreds_of_other_differences() -> None:
    result = compare_bodies_of({"rows": make_rows(0, 30), "total": 1}, {"rows": make_rows(10**6, 30)})

    assert ("$.total", "removed") in {(difference.path, difference.kind) for difference in result.differences}
    assert result.outcome == "mismatch"
    assert result.reason == "100 more differences are like those listed at their paths"


@pytest.mark.parametrize(("index", "kind"), [(5, "format"), (25, "format"), (59, "format")])
def test_empty_value_is_reported_at_any_index_of_a_list_of_fresh_ids(index: int, kind: str) -> None:
    old, new = ([{"a": FRESH_ID.format(start + n), "n": n} for n in range(60)] for start in (0, 1000))
    new[index]["a"] = ""
    result = compare_bodies_of(old, new)

    assert {(difference.path, difference.kind) for difference in result.differences} == {
        ("$[*].a", "changed"),
        ("$[*].a", kind),
    }


def test_value_without_an_explanation_is_kept_at_any_index() -> None:
    old, new = ([{"a": f"job {FRESH_ID.format(start + n)}", "n": n} for n in range(60)] for start in (0, 1000))

    assert is_explained_by_shape(compare_bodies_of(old, new).differences, 0)
    new[55]["a"] = f"task {FRESH_ID.format(1055)}"
    assert not is_explained_by_shape(compare_bodies_of(old, new).differences, 0)


def test_value_that_no_rule_tolerates_is_kept_at_any_index() -> None:
    rules = RuleSet((Rule("cents", "tolerate", path="$[*].price", absolute=0.01),))
    old, new = ([{"n": n, "price": n + cents} for n in range(60)] for cents in (0.5, 0.505))

    assert compare_bodies_of(old, new, rules).outcome == "match"
    new[50]["price"] += 0.1
    result = compare_bodies_of(old, new, rules)
    assert [difference.exact_path for difference in result.differences] == ["$[50].price"]
    assert result.outcome == "mismatch"


def test_fresh_id_in_a_location_is_explained_and_another_address_is_not() -> None:
    def respond(address: str) -> tuple[str, bool]:
        location = f"http://api.example/jobs/{FRESH_ID.format(1)}"
        old = capture("old", status=201, method="POST", headers=(("location", location),))
        new = capture("new", status=201, method="POST", headers=(("location", address),))
        (difference,) = compare(old, new).differences
        return difference.kind, is_explained_by_shape([difference], 0)

    fresh_id = FRESH_ID.format(2)
    assert respond(f"http://api.example/jobs/{fresh_id}") == ("changed", True)
    for address in ("http://api.example/job/", "https://api.example/jobs/", "http://other.example/jobs/"):
        assert respond(address + fresh_id) == ("format", False)


def test_pair_with_unlisted_places_is_partial() -> None:
    old = {f"field {chr(0x4E00 + n)}": [n] for n in range(1200)}
    result = compare_bodies_of(old, {name: str(value) for name, value in old.items()})

    assert len(result.differences) == 1000
    assert result.outcome == "partial"
    assert result.reason == "200 differences are not listed: there are too many"
