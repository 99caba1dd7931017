from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from abreast_sidecar import aio
from abreast_sidecar.aio import MAX_BACKOFF_S, MIN_BACKOFF_S, Outage, wait_or_stop


def test_outage_is_logged_at_begin_and_end() -> None:
    outage = Outage("postgres", worker="w")
    with capture_logs() as logs:
        outage.record_success()
        for _ in range(1000):
            outage.record_failure(ConnectionError("refused"))
        outage.record_success()
        outage.record_success()

    assert [(entry["event"], entry["server"], entry["worker"]) for entry in logs] == [
        ("server unavailable", "postgres", "w"),
        ("server available again", "postgres", "w"),
    ]


def test_outage_is_logged_again_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000, 20))
    monkeypatch.setattr(aio, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    outage = Outage("redis")
    with capture_logs() as logs:
        for _ in range(10):  # 200 s
            outage.record_failure(ConnectionError("refused"))

    assert len(logs) == 3


def test_outage_ends_when_all_callers_succeed() -> None:
    """A caller that succeeds while another fails must not log the outage again and again."""
    outage = Outage("postgres")
    with capture_logs() as logs:
        for _ in range(5):
            outage.record_failure(ConnectionError("too slow"), "one")
            outage.record_success("two")
        outage.record_failure(ConnectionError("too slow"), "two")
        outage.record_success("one")
        assert outage.is_active
        outage.record_success("two")

    assert [entry["event"] for entry in logs] == ["server unavailable", "server available again"]


async def test_outage_backoff_grows_to_the_maximum() -> None:
    outage, stop = Outage("redis"), asyncio.Event()
    stop.set()
    waits = []
    for _ in range(12):
        waits.append(outage._backoffs_s.get("", MIN_BACKOFF_S))
        async with asyncio.timeout(1):
            await outage.back_off(stop)

    assert waits == sorted(waits)
    assert waits[-1] == MAX_BACKOFF_S


async def test_wait_or_stop_ends_after_its_time() -> None:
    async with asyncio.timeout(5):
        await wait_or_stop(asyncio.Event(), 0.01)
