from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from abreast.protocol.capture import encode
from abreast.protocol.join import Keys
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import evaluate_entry
from abreast_sidecar.ingest.stream import MAX_ENTRY_MS, StreamEntry, parse_entry
from support_pairs import SERVICE, capture

KEYS = Keys(SERVICE, 0)


def of(*blobs: bytes, why: str = "joined", identifier: str = "1700000000000-0") -> StreamEntry:
    return StreamEntry(KEYS, identifier, "p", why, blobs, sum(map(len, blobs)))


@given(st.lists(st.binary(max_size=80), max_size=4))
def test_evaluate_entry_never_raises_for_any_content(blobs: list[bytes]) -> None:
    found = evaluate_entry(of(*blobs), CompareOptions())

    assert found.result.outcome == "undecodable"
    assert found.result.reason
    assert found.dead_letter == b"\n".join(blobs)


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=3))
def test_evaluate_entry_never_raises_for_damaged_capture(place: int, garbage: bytes) -> None:
    whole = encode(capture("p", "old"))
    damaged = whole[:place] + garbage + whole[place + len(garbage) :]

    assert evaluate_entry(of(damaged, encode(capture("p", "new", "shadow"))), CompareOptions()).result.outcome


def test_evaluate_entry_keeps_readable_half_of_pair() -> None:
    found = evaluate_entry(of(encode(capture("p", "old")), b"nonsense"), CompareOptions())

    assert found.result.outcome == "undecodable"
    assert found.endpoint == (SERVICE, "GET", "/products/{id}")


def test_evaluate_entry_turns_error_into_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_more: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr("abreast_sidecar.ingest.evaluate.compare_pair", broken)
    found = evaluate_entry(of(encode(capture("p", "old"))), CompareOptions())

    assert found.result.reason == "its comparison raised RecursionError: too deep"


def test_evaluate_entry_without_captures_has_outcome() -> None:
    assert evaluate_entry(of(why="timed_out"), CompareOptions()).result.reason == "redis has no capture of it any more"


@pytest.mark.parametrize("service", [0, 3600, -3600, 400 * 86_400, float("inf")])
@pytest.mark.parametrize("redis", [0, 240, 3600, -3600, 400 * 86_400])
def test_evaluate_entry_trusts_future_time_only_with_services(redis: int, service: float) -> None:
    now = int(time.time())
    copies = [replace(capture("p", version), started_at=now + service) for version in ("old", "new")]
    found = evaluate_entry(of(*map(encode, copies), identifier=f"{(now + redis) * 1000}-0"), CompareOptions())

    believed = redis <= 300 or service >= redis
    assert found.time_ms == (now + (redis if believed else int(service))) * 1000


def test_entry_time_stays_within_calendar() -> None:
    assert of(identifier="18446744073709551615-1").time_ms == MAX_ENTRY_MS
    assert of(identifier="0-1").time_ms == 0


def test_parse_entry_reads_fields() -> None:
    found = parse_entry(
        KEYS, b"5-1", {b"pair": b"p", b"why": b"timed_out", b"old:live:1": b"12", b"new:shadow:1": b"345"}
    )

    assert found == StreamEntry(KEYS, "5-1", "p", "timed_out", (b"12", b"345"), 5)


def test_parse_entry_without_pair_uses_entry_id() -> None:
    assert parse_entry(KEYS, b"5-1", {}).pair_id == "entry 5-1"
