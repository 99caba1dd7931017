"""Hits and misses travel with the capture, and a version that misses more is a finding."""

from __future__ import annotations

import contextlib
import random
from time import perf_counter_ns

import pytest
from msgspec.structs import replace

import abreast
from abreast.cache import Cache
from abreast.context import HIT, MAX_SPANS, add_span
from abreast.recorder import Receive, Scope, Send
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.jobs.detectors import detect_misses
from abreast_sidecar.serve.convert import summarise_finding, to_message
from abreast_sidecar.serve.render import format_place
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest
from abreast_sidecar.store.records import Finding
from support import eventually_async
from support_integrations import in_request
from support_middleware import captured, sampled
from support_pairs import outcomes, pair_of, run_worker, send

PAIRS = 400


async def test_capture_contains_cache_lookups(redis_url: str) -> None:
    async def load() -> str:
        return "loaded"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  # ASGI's signature
        async with Cache(redis_url, namespace="rows", schema_version="1", timeout=2.0) as cache:
            for key in ("product:1", "product:1", "price:1"):
                await cache.get(key, load)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    capture = await captured(app, redis_url, sampled())

    assert capture.cache == (1, 2)
    assert [(kind, name, note) for kind, name, _, _, note in capture.spans] == [
        ("cache", "product", "miss"),
        ("cache", "product", "hit"),
        ("cache", "price", "miss"),
    ]
    assert all(0 <= at <= at + duration_us <= capture.total_us for _, _, at, duration_us, _ in capture.spans)


async def test_capture_without_cache_lookups_has_no_counts(redis_url: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  # ASGI's signature
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    capture = await captured(app, redis_url, sampled())

    assert (capture.cache, capture.spans) == (None, ())


async def compare_cache(redis_url: str, postgres_url: str, old: float, new: float) -> list[Finding]:
    """Return the findings after requests of one lookup each, with these shares of misses."""
    dice = random.Random(1)
    for _ in range(PAIRS):
        old_capture, new_capture = pair_of()
        missed = [dice.random() < share for share in (old, new)]
        captures = [
            replace(capture, cache=(int(not miss), int(miss)))
            for capture, miss in zip((old_capture, new_capture), missed, strict=True)
        ]
        send(redis_url, captures)
    async with run_worker(Settings(redis_url=redis_url, postgres_url=postgres_url, shutdown_timeout=5.0)):

        async def is_decided() -> bool:
            return sum(outcomes(postgres_url).values()) == PAIRS

        await eventually_async(is_decided, description="all pairs are in the ledger")
    database = Database(postgres_url)
    await database.open()
    async with database.connection() as connection:
        await detect_misses(connection)
    page = await LedgerReader(database).list_findings(FindingFilter(), PageRequest(10))
    await database.close()
    return list(page.rows)


async def test_detect_misses_finds_twice_as_many_misses(redis_url: str, postgres_url: str) -> None:
    (finding,) = await compare_cache(redis_url, postgres_url, 0.25, 0.5)

    assert (format_place(to_message(pb.Finding, finding)), finding.kind, finding.state) == (
        "cache misses",
        "changed",
        "real",
    )
    assert finding.reason.startswith("new misses the cache 0.")
    assert "misses a request became" in summarise_finding(finding)
    assert finding.detail["new"] > 1.5 * finding.detail["old"]


@pytest.mark.parametrize(("old", "new"), [(0.3, 0.3), (0.5, 0.25), (0.0, 0.0)])
async def test_detect_misses_ignores_equal_misses(redis_url: str, postgres_url: str, old: float, new: float) -> None:
    assert await compare_cache(redis_url, postgres_url, old, new) == []


async def test_span_adds_user_spans_to_capture(redis_url: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  # ASGI's signature
        with abreast.span("parts", "search"), contextlib.suppress(LookupError), abreast.span("prices"):
            raise LookupError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    capture = await captured(app, redis_url, sampled())

    assert [(kind, name, note) for kind, name, _, _, note in capture.spans] == [
        ("call", "prices", "LookupError"),
        ("search", "parts", ""),
    ]
    assert capture.cache is None


def test_capture_limits_spans_and_still_counts_hits() -> None:
    with in_request("live") as request:
        for _ in range(MAX_SPANS + 50):
            add_span(request, "cache", "product", perf_counter_ns(), HIT)

    assert request.spans is not None
    assert len(request.spans.rows) == MAX_SPANS
    assert request.spans.hits == MAX_SPANS + 50
