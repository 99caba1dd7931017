from __future__ import annotations

import re
import time
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from abreast.protocol.join import Keys
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import evaluate_entry
from abreast_sidecar.ingest.stream import MAX_ENTRY_MS, StreamEntry, parse_entry
from support_captures import encode
from support_pairs import SERVICE, capture

KEYS = Keys(SERVICE, 0)


def make_entry(*blobs: bytes, reason: str = "joined", identifier: str = "1700000000000-0") -> StreamEntry:
    return StreamEntry(KEYS, identifier, "p", reason, blobs, sum(map(len, blobs)))


@given(st.lists(st.binary(max_size=80), max_size=4))
def test_evaluate_entry_never_raises_for_any_content(blobs: list[bytes]) -> None:
    record = evaluate_entry(make_entry(*blobs), CompareOptions())

    assert record.result.outcome == "undecodable"
    assert record.result.reason
    assert record.dead_letter == b"\n".join(blobs)


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=3))
def test_evaluate_entry_never_raises_for_damaged_capture(place: int, garbage: bytes) -> None:
    blob = encode(capture("p", "old"))
    damaged = blob[:place] + garbage + blob[place + len(garbage) :]

    assert evaluate_entry(make_entry(damaged, encode(capture("p", "new", "shadow"))), CompareOptions()).result.outcome


DEPTHS = st.sampled_from([1, 50, 300, 900, 2_000, 20_000])
SCALARS = st.sampled_from(
    [b"1e400", b"-1e400", b"1" * 400, b"9" * 19, b"-1", b"1e-400", b"NaN", b"Infinity", rb'"\ud800"', rb'"\u0000"', b'"x"',
     b"null", b"true", b"[]", b"{}", b'"' + b"x" * 5000 + b'"', b'"//evil/x"', b'"\\r\\n"']
)  # fmt: skip


@st.composite
def hostile_values(draw: st.DrawFn) -> bytes:
    """Draw JSON of any depth around a value that decoders dislike."""
    depth, opening = draw(DEPTHS), draw(st.sampled_from([b"[", b'{"a":', b'{"\\ud800":']))
    return opening * depth + draw(SCALARS) + (b"]" if opening == b"[" else b"}") * depth


PLACEHOLDER = "replaced by bytes"
HEAD_FIELDS = [
    *[(name,) for name in orjson.loads(encode(capture("p", "old")).partition(b"\n")[0])],
    *[("request", name) for name in ("method", "path", "query", "route", "headers", "body", "unknown")],
    *[("answer", name) for name in ("status", "headers", "trailers", "body", "unknown")],
    *[(name,) for name in ("unknown", "effects_dropped", "spans", "cache", "invalid_reason", "truncated_by_deadline")],
]


@st.composite
def hostile_captures(draw: st.DrawFn, version: Any, role: Any) -> bytes:
    """Draw a capture whose fields are valid, except for a few."""
    body = draw(hostile_values() | st.binary(max_size=50))
    line, _, _ = encode(capture("p", version, role)).partition(b"\n")
    head = orjson.loads(line)
    head["answer"]["body"] = [len(body), len(body), ""]
    values = []
    for path in draw(st.lists(st.sampled_from(HEAD_FIELDS), max_size=3, unique_by=lambda path: path[0])):
        parent = head if len(path) == 1 else head[path[0]]
        parent[path[-1]] = PLACEHOLDER
        values.append(draw(hostile_values()))
    if draw(st.booleans()):
        head["effects"] = [{"kind": "email.send", "key": PLACEHOLDER, "payload": PLACEHOLDER}]
        values += [draw(hostile_values()), draw(hostile_values())]
    first, *rest = orjson.dumps(head).split(b'"%b"' % PLACEHOLDER.encode())
    pieces = (value + text for value, text in zip(values, rest, strict=False))
    return b"".join((first, *pieces, b"\n", body))


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_evaluate_entry_never_raises_for_hostile_captures(data: st.DataObject) -> None:
    blobs = [data.draw(hostile_captures(*side)) for side in (("old", "live"), ("new", "shadow"), ("old", "baseline"))]
    record = evaluate_entry(make_entry(*blobs), CompareOptions())

    assert record.result.outcome
    assert (record.dead_letter is None) == (record.result.outcome != "undecodable")


@pytest.mark.parametrize("depth", [2_000, 200_000])
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a":', b"}")])
def test_evaluate_entry_makes_deeply_nested_field_a_dead_letter(depth: int, brackets: tuple[bytes, bytes]) -> None:
    blob = encode(capture("p", "old"))
    nested = b'{"unknown":' + brackets[0] * depth + b"1" + brackets[1] * depth + b"," + blob[1:]
    record = evaluate_entry(make_entry(nested, encode(capture("p", "new", "shadow"))), CompareOptions())

    assert record.result.reason == "a capture is nested too deeply"
    assert record.dead_letter is not None


@pytest.mark.parametrize("path", ["", "@127.0.0.1/x", "127.0.0.1/x", "http://127.0.0.1/x", "\\\\127.0.0.1", "*"])
def test_evaluate_entry_rejects_path_without_slash(path: str) -> None:
    hostile = capture("p", "old")
    hostile = replace(hostile, request=replace(hostile.request, path=path))
    record = evaluate_entry(make_entry(encode(hostile), encode(capture("p", "new", "shadow"))), CompareOptions())

    assert record.result.reason == "a capture is damaged: its path must begin with /"
    assert record.dead_letter is not None


@pytest.mark.parametrize("secret_head", [b'{"v":{"card":"4111"}}', b'{"v":"4111"}', b'{"v":1,"role":"4111"}', b"4111"])
def test_evaluate_entry_keeps_captured_values_out_of_reason(secret_head: bytes) -> None:
    blob = encode(capture("p", "old")).replace(b'"role":"live"', b'"role":"4111"')
    for content in (blob, secret_head + b"\n"):
        assert "4111" not in evaluate_entry(make_entry(content), CompareOptions()).result.reason


def test_evaluate_entry_keeps_readable_half_of_pair() -> None:
    record = evaluate_entry(make_entry(encode(capture("p", "old")), b"nonsense"), CompareOptions())

    assert record.result.outcome == "undecodable"
    assert record.endpoint == (SERVICE, "GET", "/products/{id}")


def test_evaluate_entry_turns_error_into_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_more: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr("abreast_sidecar.ingest.evaluate.compare_pair", broken)
    record = evaluate_entry(make_entry(encode(capture("p", "old"))), CompareOptions())

    assert re.fullmatch(
        r"its comparison raised RecursionError in tests.unit.test_ingest_evaluate, line \d+", record.result.reason
    )


def test_evaluate_entry_without_captures_has_outcome() -> None:
    assert (
        evaluate_entry(make_entry(reason="timed_out"), CompareOptions()).result.reason
        == "redis has no capture of it any more"
    )


@pytest.mark.parametrize("service", [0, 3600, -3600, 400 * 86_400, float("inf")])
@pytest.mark.parametrize("redis", [0, 240, 3600, -3600, 400 * 86_400])
def test_evaluate_entry_trusts_future_time_only_with_services(redis: int, service: float) -> None:
    now = int(time.time())
    copies = [replace(capture("p", version), started_at=now + service) for version in ("old", "new")]
    record = evaluate_entry(make_entry(*map(encode, copies), identifier=f"{(now + redis) * 1000}-0"), CompareOptions())

    believed = redis <= 300 or service >= redis
    assert record.time_ms == (now + (redis if believed else int(service))) * 1000


def test_entry_time_stays_within_calendar() -> None:
    assert make_entry(identifier="18446744073709551615-1").time_ms == MAX_ENTRY_MS
    assert make_entry(identifier="0-1").time_ms == 0


def test_parse_entry_reads_fields() -> None:
    entry = parse_entry(
        KEYS, b"5-1", {b"pair": b"p", b"why": b"timed_out", b"old:live:1": b"12", b"new:shadow:1": b"345"}
    )

    assert entry == StreamEntry(KEYS, "5-1", "p", "timed_out", (b"12", b"345"), 5)


def test_parse_entry_without_pair_uses_entry_id() -> None:
    assert parse_entry(KEYS, b"5-1", {}).pair_id == "entry 5-1"
