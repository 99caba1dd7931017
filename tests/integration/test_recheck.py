"""A worker asks both versions again: real services over HTTP, real Redis, real Postgres."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import uvicorn
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from abreast import ParallelRunMiddleware
from abreast.protocol.capture import Capture
from abreast_sidecar.errors import SettingError
from abreast_sidecar.ingest.recheck import RecheckSettings
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest
from abreast_sidecar.store.records import Window
from support import eventually_async, find_free_port
from support_pairs import hourly_counts_match_pairs, one, pair_of, rows, running, send, stats

pytestmark = pytest.mark.postgres

AFTER = 0.2  # seconds


@dataclass
class Version:
    """A version of a service, whose state the test moves."""

    redis_url: str
    stock: int = 5
    held: asyncio.Event | None = None  # it answers once this is set
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    async def product(self, request: Request) -> JSONResponse:
        self.seen.append((request.method, str(request.url.path), dict(request.headers)))
        if self.held is not None:
            await self.held.wait()
        return JSONResponse({"stock": self.stock}, headers={"x-noise": str(uuid.uuid4())})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = Starlette(routes=[Route("/products/{id}", self.product, methods=["GET", "POST"])])
        app.add_middleware(ParallelRunMiddleware, service="shop", redis_url=self.redis_url)
        port = find_free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        task = asyncio.create_task(server.serve())
        self.url = f"http://127.0.0.1:{port}"

        async def started() -> bool:
            return server.started

        await eventually_async(started, what="the version listens")
        try:
            yield
        finally:
            server.should_exit = True
            await task


@dataclass
class Bench:
    settings: Settings
    old: Version
    new: Version

    def send(self, old: Any, new: Any, **changes: Any) -> str:
        """Send a pair with these answers, and return its id."""
        captures = [self._like_theirs(capture, **changes) for capture in pair_of(old, new)]
        send(self.settings.redis_url, captures)
        return captures[0].pair

    def _like_theirs(self, capture: Capture, **changes: Any) -> Capture:
        headers = (*capture.answer.headers, ("x-noise", str(uuid.uuid4())))
        asked = replace(capture.request, **changes)
        return replace(capture, request=asked, answer=replace(capture.answer, headers=headers))

    async def asked(self, many: int) -> None:
        async def enough() -> bool:
            return len(self.old.seen) >= many and len(self.new.seen) >= many

        await eventually_async(enough, what=f"{many} pairs are asked again")

    async def committed(self, many: int) -> None:
        async def there() -> bool:
            return bool(one(self.settings.postgres_url, "select count(*) from abreast.pair") >= many)

        await eventually_async(there, what=f"{many} pairs are in the ledger")

    def stock(self, pair: str) -> tuple[bool, bool]:
        """Return whether the pair shows the stock as a finding, and whether it is drift."""
        query = f"select f.id = any(p.findings), f.id = any(coalesce(p.drift, '{{}}')) from abreast.pair p, abreast.finding f where p.id = '{pair}' and f.path = '$.stock'"  # noqa: S608  # our own
        return rows(self.settings.postgres_url, query)[0]


@asynccontextmanager
async def bench(redis_url: str, postgres_url: str, **changes: Any) -> AsyncIterator[Bench]:
    old, new = Version(redis_url), Version(redis_url)
    async with old.serving(), new.serving():
        settings = Settings(
            redis_url=redis_url,
            postgres_url=postgres_url,
            recheck_delay=AFTER,
            recheck_old_url=old.url,
            recheck_new_url=new.url,
            **{"recheck_per_minute": 60, **changes},
        )
        async with running(settings):
            yield Bench(settings, old, new)


async def test_recheck_detects_drift_and_counts_it_separately(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url) as found:
        found.old.stock = found.new.stock = 4
        pair = found.send({"stock": 5}, {"stock": 4})

        async def told() -> bool:
            return bool(one(postgres_url, "select coalesce(sum(drift_count), 0) from abreast.finding"))

        await eventually_async(told, what="it is told")
        method, path, headers = found.old.seen[0]
        captures = stats(redis_url)["received"]

    database = Database(postgres_url)
    await database.open()
    async with database.connection() as connection:
        await classify_findings(connection)
    listed = (await LedgerReader(database).list_findings(FindingFilter(only_explained=True), PageRequest(10))).rows
    counted = (await LedgerReader(database).list_findings(FindingFilter(), PageRequest(10))).rows
    today = FindingFilter(only_explained=True, window=Window(datetime.now(UTC) - timedelta(hours=1)))
    in_window = (await LedgerReader(database).list_findings(today, PageRequest(10))).rows
    shown = await LedgerReader(database).get_pair(pair)
    await database.close()

    hourly_counts_match_pairs(postgres_url)
    assert found.stock(pair) == (False, True)
    assert one(postgres_url, "select count from abreast.finding where path = '$.stock'") == 0
    assert "drift of state" in one(postgres_url, "select reason from abreast.pair")
    assert [one.path for one in counted if one.path == "$.stock"] == []
    (stock,) = (one for one in listed if one.path == "$.stock")
    assert [(why.cause, why.pairs) for why in stock.explanations] == [("drift", 1)]
    assert "$.stock" in {one.path for one in in_window}
    assert (shown.pair.drift, [one.is_drift for one in shown.differences if one.path == "$.stock"]) == (
        (stock.id,),
        [True],
    )
    assert (method, path, headers["x-abreast-recheck"]) == ("GET", "/products/7", "1")
    assert captures == 2  # only rechecks; the middleware sent no such request


async def test_recheck_keeps_finding_of_an_occasional_error(redis_url: str, postgres_url: str) -> None:
    """In each recheck its response is right, whether or not the state changed meanwhile."""
    async with bench(redis_url, postgres_url) as found:
        still = [found.send({"stock": 5}, {"stock": 0}) for _ in range(5)]
        await found.asked(5)
        found.old.stock = found.new.stock = 4
        moved = [found.send({"stock": 5}, {"stock": 0}) for _ in range(5)]
        await found.asked(10)
        drifting = found.send({"stock": 5}, {"stock": 4})

        async def told() -> bool:
            return found.stock(drifting) == (False, True)

        await found.committed(11)
        await eventually_async(told, what="the drift among them is told")

    assert [found.stock(pair) for pair in (*still, *moved)] == [(True, False)] * 10
    assert one(postgres_url, "select count from abreast.finding where path = '$.stock'") == 10


async def test_recheck_skips_unsafe_and_unrepeatable_requests(redis_url: str, postgres_url: str) -> None:
    secret = (("authorization", "hmac:0123456789abcdef"),)
    async with bench(redis_url, postgres_url) as found:
        found.send({"stock": 5}, {"stock": 4}, method="POST")
        found.send({"stock": 5}, {"stock": 4}, headers=secret)
        found.send({"stock": 5}, {"stock": 4}, headers=(("if-none-match", "a"),))
        await found.committed(3)
        found.send({"stock": 5}, {"stock": 4}, headers=(("accept-language", "de"),))
        await found.asked(1)

    assert [headers["accept-language"] for _, _, headers in found.old.seen] == ["de"]


async def test_recheck_respects_limit_per_minute(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=2) as found:
        for _ in range(20):
            found.send({"stock": 5}, {"stock": 4})
        await found.asked(2)
        await found.committed(20)
        await asyncio.wait_for(asyncio.shield(asyncio.create_task(_turns(5))), 10)

    assert len(found.old.seen) == len(found.new.seen) == 2


async def _turns(many: int) -> None:
    for _ in range(many):
        await asyncio.sleep(AFTER / 4)  # turns of its loop, in which a third could begin


async def test_recheck_of_hanging_version_delays_no_worker(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url) as found:
        found.old.held = asyncio.Event()
        found.send({"stock": 5}, {"stock": 4})

        async def hanging() -> bool:
            return bool(found.old.seen)

        await eventually_async(hanging, what="old is asked")
        for _ in range(50):
            found.send({"stock": 5}, {"stock": 5})
        await found.committed(51)

        assert not found.new.seen  # old has not answered yet
        found.old.held.set()


def test_recheck_settings_need_both_addresses() -> None:
    with pytest.raises(SettingError, match="ABREAST_RECHECK_OLD_URL and ABREAST_RECHECK_NEW_URL"):
        RecheckSettings.from_settings(Settings(recheck_per_minute=10))
    assert RecheckSettings.from_settings(Settings()) is None
