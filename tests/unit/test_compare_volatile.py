"""Changes that shapes explain, and changes that they must not explain."""

from __future__ import annotations

import base64
import hashlib
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from abreast_sidecar.compare.json_diff import JsonDiff
from abreast_sidecar.compare.model import Difference, JsonPath
from abreast_sidecar.compare.values import parse
from abreast_sidecar.compare.volatile import (
    classify_anomaly,
    expand_embedded,
    explain_change,
    get_direction,
    get_values,
    is_explained_by_shape,
)
from support_pairs import difference

NOW = 1_714_564_805.0  # 2024-05-01T12:00:05Z
AT = time.time()
U1, U2, U7 = (
    "9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d",
    "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed",
    "017f22e2-79b0-7cc3-98c4-dc0c0c07398f",
)
HEX1, HEX2 = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
TOKEN1, TOKEN2 = "8xLOxBtZp8dU3kQ1v7Wm2c", "V1StGXR8Z5jdHi6Bmy4T2q"
NIL = str(uuid.UUID(int=0))
SIGNED = "https://cdn.example.com/a.png?w=10&X-Amz-Signature={}&Expires={}"

EXPLAINED: list[tuple[Any, Any, str]] = [
    (U1, U2, "uuid"),
    ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "01HX5ZZKBKACTAV9WEVGEMMVRZ", "ulid"),
    ("507f1f77bcf86cd799439011", "65e4a7f3b2c91d0811223344", "hex"),
    (hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest(), "hash"),
    ("8xLOxBtZp8dU3kQ1v7Wm2c", "V1StGXR8Z5jdHi6Bmy4T2q", "token"),
    ("q83vEjRWeJCrze8SNFZ4kA==", "EnFm3QljCzT4VyQqNL1+Ag==", "base64"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJhIjoxfQ.x1", "eyJhbGciOiJIUzI1NiJ9.eyJhIjoyMn0.y2", "jwt"),
    ("2024-05-01T12:00:05Z", "2024-05-01T12:00:06Z", "timestamp"),
    ("2024-05-01T12:00:05.9Z", "2024-05-01T12:00:06.012Z", "timestamp"),
    ("2024-05-01 12:00:05", "2024-05-01 12:00:09", "timestamp"),
    ("Wed, 01 May 2024 12:00:05 GMT", "Wed, 01 May 2024 12:00:06 GMT", "timestamp"),
    ("2024-05-01T11:58:05Z", "2024-05-01T12:00:06Z", "timestamp"),
    (1714564805, 1714564806, "unix time"),
    (1714564805123, 1714564806123, "unix time"),
    ("1714564805", "1714564806", "unix time"),
    (SIGNED.format("abc", "1714"), SIGNED.format("xyz", "1719"), "signed url"),
    (f"order {U1} was made", f"order {U2} was made", "uuid inside"),
    ("seen 2024-05-01T12:00:05Z by Anna", "seen 2024-05-01T12:00:06Z by Anna", "timestamp inside"),
    (f"https://x.example/{U1}?a=1", f"https://x.example/{U1}?a=1&b=2", ""),
    (f"http://h.example/jobs/{U1}", f"http://h.example/jobs/{U2}", "uuid inside"),
    (f"http://h.example:8080/v1/jobs/{U1}/log", f"http://h.example:8080/v1/jobs/{U2}/log", "uuid inside"),
    (f"/jobs/{U1}", f"/jobs/{U2}", "uuid inside"),
    (f"/jobs/{U1}?page=1", f"/jobs/{U2}?page=1", "uuid inside"),
    (f"s3://bucket/{HEX1}.json", f"s3://bucket/{HEX2}.json", "hash inside"),
    (f"https://h.example/?session={TOKEN1}#top", f"https://h.example/?session={TOKEN2}#top", "token inside"),
    (
        "https://h.example/?at=2024-05-01T12%3A00%3A05Z",
        "https://h.example/?at=2024-05-01T12%3A00%3A06Z",
        "timestamp inside",
    ),
    ("https://h.example/?at=1714564805", "https://h.example/?at=1714564806", "unix time inside"),
    (f"https://h.example/{U1}?sig=abc", f"https://h.example/{U2}?sig=xyz", "uuid inside"),
    (f"job {HEX1}: started", f"job {HEX2}: started", "hash inside"),
    (f"id={HEX1}; path=/", f"id={HEX2}; path=/", "hash inside"),
    (f"see https://h.example/jobs/{U1}, please", f"see https://h.example/jobs/{U2}, please", "uuid inside"),
    ("sent Wed, 01 May 2024 12:00:05 GMT by x1", "sent Wed, 01 May 2024 12:00:06 GMT by x1", "timestamp inside"),
    (f'["{U1}", "{HEX1}"]', f'["{U2}", "{HEX2}"]', "uuid inside"),
    (f"job_{U1}.pdf", f"job_{U2}.pdf", "uuid inside"),
]

NEVER: list[tuple[Any, Any]] = [
    (U1, ""), (U1, None), (U1, "not found"), (U1, NIL), (NIL, U1), (U1, U7), (U1, U1.upper()), (U1, U1.replace("-", "")),
    (U1, 42), (U1, [U1]), ("8xLOxBtZp8dU3kQ1v7Wm2c", "8xLOxBtZp8dU3kQ1v7Wm"), (hashlib.sha256(b"a").hexdigest(), "a" * 64),
    ("507f1f77bcf86cd799439011", "4bf92f3577b34da6"), ("2024-05-01T12:00:05Z", "2024-05-02T12:00:05Z"),
    ("2024-05-01T12:00:05Z", "2024-05-01T13:00:05Z"), ("2024-05-01T12:00:05Z", "2024-05-01T12:00:05+00:00"),
    ("2024-05-01T12:00:05Z", "2024-05-01T12:00:05"), ("2024-05-01T12:00:05Z", "2024-05-01"),
    ("2024-05-01T12:00:05+00:00", "2024-05-01T14:00:05+02:00"), ("2024-02-31T12:00:05Z", "2024-02-31T12:00:06Z"),
    ("2024-05-01T12:00:05Z", 1714564805), ("2024-05-01", "2024-05-02"), ("12:00:05", "12:00:06"),
    (1714564805, 1714564805123), (1714564805, 1814564805), (1500000000, 1500000001), ("1500000000", "1500000001"),
    (19.99, 19.98), (1999, 1998), (19, 19.0), ("19.99", "19.98"), ("1999", "1998"), (0.1, 0.2), (1, 2), (10, 11),
    ("EUR", "JPY"), ("Anna", "Otto"), ("in_stock", "out_stock"), ("red shoes", "blue shoes"), ("/a/1", "/a/2"),
    ("SKU-2024-RED-XL-0001", "SKU-2024-RED-XL-0002"), ("4111111111111111", "4111111111111112"),
    ("DE89370400440532013000", "DE89370400440532013001"), ("a@b.co", "c@b.co"), ("10.0.0.1", "10.0.0.2"),
    ("cus_9s6XKzkNRiz8i3", "cus_9s6XKzkNRiz8i4"), (True, False), (None, ""), (None, 0), ("", " "), ([], {}), ([1], [2]),
    ({"a": 1}, {"a": 2}), ("iphone-15-pro-max-256gb", "iphone-15-pro-max-512gb"),
    (SIGNED.format("abc", "1714"), SIGNED.format("", "1714")), (SIGNED.format("abc", "1"), SIGNED.format("abcd", "1")),
    (SIGNED.format("abc", "1"), SIGNED.format("xyz", "1").replace("w=10", "w=20")),
    (SIGNED.format("abc", "1"), SIGNED.format("xyz", "1").replace("a.png", "b.png")),
    (SIGNED.format("abc", "1"), SIGNED.format("abc", "1").partition("?")[0]),
    (f"order {U1} was made", f"order {U2} was lost"), (f"order {U1} was made", f"order {NIL} was made"),
    ("due 2024-05-01T12:00:05Z", "due 2024-06-01T12:00:05Z"), ("https://a.example/1", "https://a.example/2"),
    (f"http://h/jobs/{U1}", f"http://h/job/{U2}"), (f"http://h/jobs/{U1}", f"https://h/jobs/{U2}"),
    (f"http://h/jobs/{U1}", f"http://g/jobs/{U2}"), (f"http://h/jobs/{U1}", f"http://h:81/jobs/{U2}"),
    (f"http://h/jobs/{U1}", f"http://h/jobs/{U2}/"), (f"http://h/jobs/{U1}", f"http://h/jobs/{NIL}"),
    (f"http://h/jobs/{U1}", f"http://h/jobs/{HEX1}"), (f"http://h/jobs/{U1}?a=1", f"http://h/jobs/{U2}?a=2"),
    (f"http://h/{U1}?a=1", f"http://h/{U2}?b=1"), (f"http://h/{U1}?a=", f"http://h/{U1}?a={U1}"),
    (f"http://{U1}.h.example/a", f"http://{U2}.h.example/a"), (f"/jobs/{U1}", f"/task/{U2}"), (f"/jobs/{U1}", f"/jobs/{U2}/a"),
    (f"job_{U1}.pdf", f"bob_{U2}.pdf"), (f"{HEX1}.html", f"{HEX2}.json"), (f"a/{HEX1}.html", f"b/{HEX2}.html"),
    (f"job {HEX1}: started", f"job {HEX2}: stopped"), (f"job {HEX1} took 5 ms", f"job {HEX2} took 6 ms"),
    ("took 5 ms", "took 6 ms"), ("took 5ms", "took 6ms"), (f"{U1} of 3 items", f"{U2} of 4 items"), (f"a {U1}", f"a  {U2}"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "reason"), EXPLAINED)
def test_explain_change_accepts_volatile_values(old: Any, new: Any, reason: str) -> None:
    assert (explain_change(old, new, NOW) or "") == reason
    assert (explain_change(new, old, NOW) or "") == reason


@pytest.mark.parametrize(("old", "new"), NEVER)
def test_explain_change_rejects_meaningful_values(old: Any, new: Any) -> None:
    assert explain_change(old, new, NOW) is None
    assert explain_change(new, old, NOW) is None


@pytest.mark.parametrize(("old", "new"), [(1714564805, 1714564806), (1714564805123, 1714564805124)])
def test_explain_change_needs_the_request_time_for_numeric_times(old: int, new: int) -> None:
    assert explain_change(old, new) is None
    assert explain_change(old, new, NOW + 3600) is None


@given(st.floats(), st.floats())
def test_explain_change_rejects_floats(old: float, new: float) -> None:
    assert explain_change(old, new, NOW) is None


@given(st.integers(), st.integers())
def test_explain_change_rejects_integers_that_are_no_time(old: int, new: int) -> None:
    near = all(abs(value / scale - NOW) <= 300 for value in (old,) for scale in (1, 1000))

    assume(not near)
    assert explain_change(old, new, NOW) is None


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz ", max_size=40), st.text(alphabet="abcdefghijklmnop ", max_size=40))
def test_explain_change_rejects_words(old: str, new: str) -> None:
    assert explain_change(old, new, NOW) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.uuids().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(JSON, JSON)
def test_explain_change_is_symmetric_and_accepts_any_json(old: Any, new: Any) -> None:
    assert explain_change(old, new, NOW) == explain_change(new, old, NOW)


@given(st.datetimes(datetime(2001, 1, 1), datetime(2090, 1, 1)), st.integers(0, 9))  # noqa: DTZ001 - the zone is added below
def test_explain_change_accepts_times_of_one_moment(moment: datetime, seconds: int) -> None:
    value = moment.replace(tzinfo=UTC, microsecond=0)

    assert explain_change(value.isoformat(), (value + timedelta(seconds=seconds)).isoformat()) == "timestamp"


def test_shape_explains_fresh_ids_but_not_prices() -> None:
    first_id, second_id = uuid.uuid4(), uuid.uuid4()

    assert is_explained_by_shape([difference(old=f'"{first_id}"', new=f'"{second_id}"')], AT)
    assert not is_explained_by_shape([difference(old="1.5", new="1.6")], AT)
    assert not is_explained_by_shape([difference(kind="removed", old=f'"{first_id}"', new=None)], AT)


def test_shape_must_explain_every_value() -> None:
    fresh = difference(old=f'"{uuid.uuid4()}"', new=f'"{uuid.uuid4()}"')

    assert is_explained_by_shape([fresh, fresh], AT)
    assert not is_explained_by_shape([fresh, difference(old='"a"', new='"b"')], AT)


def test_shape_never_explains_a_status_as_a_time() -> None:
    now = str(int(AT))

    assert not is_explained_by_shape([difference("200->500", part="status", old=now, new=now)], AT)


@pytest.mark.parametrize(
    ("kind", "old", "new", "side"),
    [
        ("added", None, "1", 1),
        ("removed", "1", None, -1),
        ("changed", "1.5", "1.6", 1),
        ("changed", '"b"', '"a"', -1),
        ("changed", "true", "false", 0),
        ("type", "null", "1", 1),
        ("type", '"1"', "1", -1),
        ("order", "[1,2]", "[2,1]", 0),
        ("changed", '"cut…', '"cut…', 0),
    ],
)
def test_direction_points_to_the_greater_value(kind: str, old: str | None, new: str | None, side: int) -> None:
    assert get_direction(difference(kind=kind, old=old, new=new)) == side


def test_values_of_a_document_are_not_truncated() -> None:
    old, new = "a" * 2000, "a" * 1999 + "b"
    (difference,) = JsonDiff(200).compare({"text": old}, {"text": new})

    assert get_values(difference) == (old, new)
    assert get_direction(difference) == 1


def test_direction_of_numbers_beyond_floats() -> None:
    old, new = (
        b'{"a": 0.123456789012345678, "b": 1, "c": 1e999}',
        b'{"a": 0.5, "b": 1e400, "c": 1e99999999999999999999999}',
    )
    differences = JsonDiff(10).compare(parse(old), parse(new))

    assert [get_direction(item) for item in differences] == [1, 1, 0]
    assert not is_explained_by_shape(differences, time.time())


WORD_TEXT = st.text(alphabet="abcdefgh", min_size=1, max_size=8)
FRESH = st.one_of(
    st.uuids(version=4).map(str),
    st.binary(min_size=32, max_size=32).map(lambda content: hashlib.sha256(content).hexdigest()),
)


@given(
    st.lists(WORD_TEXT, min_size=1, max_size=4),
    WORD_TEXT,
    st.sampled_from(["http://h.example/{}/{}", "/{}/{}?a=b", "the {} with {} is here", "{}: {}", "<{}>({})"]),
    st.uuids(version=4),
    st.uuids(version=4),
    st.booleans(),
)
def test_explain_change_finds_a_change_beside_a_fresh_id(
    words: list[str], other: str, form: str, old_id: uuid.UUID, new_id: uuid.UUID, is_at_start: bool
) -> None:
    assume(old_id != new_id)
    separator = "/" if "/{}" in form else " "
    changed = [other, *words[1:]] if is_at_start else [*words[:-1], other]
    old = form.format(separator.join(words), old_id)
    new = form.format(separator.join(words), new_id)
    new_and_changed = form.format(separator.join(changed), new_id)

    assert explain_change(old, new, NOW) == "uuid inside"
    assert classify_anomaly(old, new, (NOW, NOW)) is None
    if words != changed:
        assert explain_change(old, new_and_changed, NOW) is None
        assert classify_anomaly(old, new_and_changed, (NOW, NOW)) == ("format", "value")


TOKENS = st.lists(
    st.one_of(
        st.sampled_from([U1, U2, HEX1, HEX2, TOKEN1, "2024-05-01T12:00:05Z", "job", "5ms", "http://", "a.b", "="]),
        FRESH,
    ),
    max_size=6,
)


@given(TOKENS, TOKENS, st.sampled_from(["/", " ", "", "&", ":"]))
def test_explain_change_of_texts_is_symmetric(old: list[str], new: list[str], separator: str) -> None:
    before, after = separator.join(old), separator.join(new)

    assert explain_change(before, after, NOW) == explain_change(after, before, NOW)


def count_calls(old: str, new: str) -> int:
    """Count the calls of Python and C functions, which are the same on every machine."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        explain_change(old, new, NOW)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("separator", [" ", "/", ":", "=", "://", "."])
@pytest.mark.parametrize("start", ["", "/a?"])
def test_explain_change_of_long_texts_takes_linear_work(start: str, separator: str) -> None:
    few, many = (
        count_calls(start + separator.join([HEX1] * count), start + separator.join([HEX2] * count))
        for count in (200, 400)
    )

    assert many <= 2.2 * few


def expand(
    old: str, new: str, path: str = "$.text", start: float = NOW
) -> list[tuple[str, str, str | None, str | None]]:
    root, _, step = path.rpartition(".")
    location = JsonPath(JsonPath(None, root, {}, {}), step, old, new)
    found = expand_embedded([Difference("body", path, "changed", "value", location)], (start, start))
    return [(part.path, part.kind, part.old, part.new) for part in found]


def make_jwt(**claims: Any) -> str:
    parts = (orjson.dumps({"alg": "HS256"}), orjson.dumps(claims), uuid.uuid4().bytes)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def test_expand_embedded_compares_json_in_text() -> None:
    old, new = '{"total":129.5,"items":[{"sku":"a","n":1}]}', '{"total":130.5,"items":[{"sku":"a","n":2}]}'

    assert expand(old, new) == [
        ("$.text.total", "changed", "129.5", "130.5"),
        ("$.text.items[*].n", "changed", "1", "2"),
    ]
    encoded = [base64.b64encode(text.encode()).decode() for text in (old, new)]
    assert expand(encoded[0], encoded[1]) == expand(old, new)
    assert [path for path, *_ in expand(old, "no JSON")] == ["$.text"]
    assert [path for path, *_ in expand(old, old.replace(",", ", "))] == ["$.text"]  # only the text differs


def test_expand_embedded_compares_claims_and_times_of_jwt() -> None:
    old = make_jwt(jti=U1, exp=int(NOW) + 3600, scope="read")

    assert expand(old, make_jwt(jti=U1, exp=int(NOW) + 3600, scope="admin")) == [
        ("$.text.claims.scope", "changed", '"read"', '"admin"')
    ]
    unsigned = make_jwt(jti=U2, exp=int(NOW) + 3600, scope="read").rpartition(".")[0] + "."
    assert ("$.text.is_signed", "changed", "true", "false") in expand(old, unsigned)
    (later,) = expand(old, make_jwt(jti=U1, exp=int(NOW) + 3601, scope="read"))
    assert explain_change(*(orjson.loads(text or "") for text in later[2:])) == "timestamp"


def test_expand_embedded_compares_members_of_form_and_columns_of_csv() -> None:
    assert expand("sid=1234567&page=1", "sid=7654321&page=2") == [
        ("$.text.sid", "changed", '"1234567"', '"7654321"'),
        ("$.text.page", "changed", '"1"', '"2"'),
    ]
    assert expand("r1,50.10,EUR", "r1,50.10,USD", "lines.row") == [
        ("lines.row", "changed", '"r1,50.10,EUR"', '"r1,50.10,USD"')
    ]
    assert expand("r1,50.10,EUR", "r1,50.10,USD", "lines[*].row") == [
        ("lines[*].row.column3", "changed", '"EUR"', '"USD"')
    ]
    prose = "first, second, third", "first, second, last"
    assert [path for path, *_ in expand(*prose, "lines[*].row")] == ["lines[*].row"]


def test_expand_embedded_compares_data_of_scripts() -> None:
    old, new = 'window.S = {"total": 40, "csrf": "x"};', 'window.S = {"total": 41, "csrf": "x"};'

    assert expand(old, new, "html.body.script") == [("html.body.script.total", "changed", "40", "41")]
    assert [path for path, *_ in expand(old, f"{new} more()", "html.body.script")] == ["html.body.script"]
    assert [path for path, *_ in expand(old, new)] == ["$.text"]


@pytest.mark.parametrize(
    ("old", "new", "paths"),
    [
        ('{"x":1,"id":90071992547409931234.5}', '{"x":2,"id":90071992547409931239.5}', [".x", ".id"]),
        ('{"x":NaN,"y":1}', '{"x":NaN,"y":2}', [".y"]),
        ('{"x":1,"x":2,"y":1}', '{"x":9,"x":2,"y":2}', ['["x (repeated)"]', ".y"]),
    ],
)
def test_expand_embedded_keeps_details_of_script_data(old: str, new: str, paths: list[str]) -> None:
    found = [path for path, *_ in expand(f"S = {old};", f"S = {new};", "html.body.script")]

    assert sorted(found) == sorted(f"html.body.script{path}" for path in paths)


@pytest.mark.parametrize(
    ("old", "new", "paths"),
    [
        ("https://a.example/c?page=1", "https://a.example/c?page=2", ["$.text"]),  # one part: the address
        ("https://a.example/c?cb=123456", "http://a.example/c?cb=654321", ["$.text.origin", "$.text"]),
        ("https://a.example/c?w=640&v=A", "https://a.example/c?w=320&v=B", ["$.text.query.w", "$.text.query.v"]),
        (f"https://a.example/c?id={U1}&v=A", f"https://a.example/c?id={U2}&v=B", ["$.text.query.v"]),
        (f"https://a.example/c?id={U1}", f"https://a.example/c?id={U2}", ["$.text"]),  # explained
        (f"https://a.example/jobs/{U1}", f"https://a.example/job/{U2}", ["$.text"]),  # of another format
        ("https://a.example/click/x/1234", "https://a.example/view/x/4321", ["$.text.segment1", "$.text"]),
        ("https://a.example/a/b?utm=x&cb=1234", "https://a.example/a/b?cb=4321", ["$.text.query.utm", "$.text"]),
        ("https://s3.example/c?cb=123456", "http://s3.example/c?cb=654321", ["$.text.origin", "$.text"]),
        ("https://a:8443/c?cb=123456", "https://a:9999/c?cb=654321", ["$.text.origin", "$.text"]),
        ("https://a.example/api-v1/c?cb=123456", "https://a.example/api-v2/c?cb=654321", ["$.text.segment1", "$.text"]),
    ],
)  # fmt: skip
def test_expand_embedded_separates_parts_of_address_from_its_noise(old: str, new: str, paths: list[str]) -> None:
    assert sorted(path for path, *_ in expand(old, new)) == sorted(paths)


def test_expand_embedded_keeps_signed_address_and_reports_its_lifetime() -> None:
    address = "https://s3.example/f?expires={}&signature={}"
    old = address.format(int(NOW) + 3600, HEX1)

    assert [path for path, *_ in expand(old, address.format(int(NOW) + 3601, HEX2))] == ["$.text"]
    assert [path for path, *_ in expand(old, address.format(int(NOW) + 7200, HEX2))] == ["$.text.query.expires"]


def test_expand_embedded_leaves_large_and_hostile_texts() -> None:
    deep = "[" * 5000
    many = orjson.dumps({f"k{n}": n for n in range(500)}).decode()

    assert [path for path, *_ in expand(deep, deep + "]")] == ["$.text"]
    nested = "[" * 600 + "{}" + "]" * 600
    assert [path for path, *_ in expand(nested.format(1), nested.format(2))] == ["$.text"]
    assert [path for path, *_ in expand(many, many.replace(":", ":1"))] == ["$.text"]
    assert [path for path, *_ in expand("a=" * 9000, "b=" * 9000)] == ["$.text"]
    began = time.process_time()
    expand("x=({" * 4000, "x=({" * 4000 + "}", "html.body.script")
    assert time.process_time() - began < 1


def test_expand_embedded_bounds_differences_of_pair() -> None:
    text = orjson.dumps({f"k{n}": n for n in range(40)}).decode()
    rows = [
        Difference(
            "body", "$[*]", "changed", "value", JsonPath(JsonPath(None, "$", [], []), n, text, text.replace(":", ":1"))
        )
        for n in range(200)
    ]

    assert len(expand_embedded(rows, (NOW, NOW))) <= 400 + 40 + 200
