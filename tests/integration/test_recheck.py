"""A worker asks both versions again: real services over HTTP, real Redis, real Postgres."""

from __future__ import annotations

import asyncio
import random
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
from abreast_sidecar.ingest import recheck
from abreast_sidecar.ingest.recheck import RecheckSettings
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import samples
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest
from abreast_sidecar.store.records import Window
from support import eventually_async, find_free_port
from support_pairs import hourly_counts_match_pairs, pair_of, query_value, rows, run_worker, send, stats

pytestmark = pytest.mark.postgres

AFTER = 0.2  # seconds
RETEST_S = 0.2


@dataclass
class Version:
    """A version of a service, whose state the test moves."""

    redis_url: str
    stock: int = 5
    gate: asyncio.Event | None = None  # it answers once this is set
    location: str = ""  # it redirects there
    noise: random.Random | None = None  # the stock is random
    status: int = 200
    arrivals: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    async def product(self, request: Request) -> JSONResponse:
        self.requests.append((request.method, str(request.url.path), dict(request.headers)))
        if self.gate is not None:
            await self.gate.wait()
        if self.location:
            return JSONResponse({}, 302, headers={"location": self.location, "set-cookie": "user=ada"})
        stock = self.noise.randint(6, 7) if self.noise else self.stock
        return JSONResponse({"stock": stock}, self.status, headers={"x-noise": str(uuid.uuid4())})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async def count_arrival(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
            self.arrivals += 1
            return JSONResponse({}, 404)

        app = Starlette(
            exception_handlers={404: count_arrival},
            routes=[Route("/products/{id}", self.product, methods=["GET", "POST"])],
        )
        app.add_middleware(ParallelRunMiddleware, service="shop", redis_url=self.redis_url)
        port = find_free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        task = asyncio.create_task(server.serve())
        self.url = f"http://127.0.0.1:{port}"

        async def started() -> bool:
            return server.started

        await eventually_async(started, description="the version listens")
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
        request = replace(capture.request, **changes)
        return replace(capture, request=request, answer=replace(capture.answer, headers=headers))

    async def wait_for_rechecks(self, count: int) -> None:
        async def enough() -> bool:
            return len(self.old.requests) >= count and len(self.new.requests) >= count

        await eventually_async(enough, description=f"{count} pairs are asked again")

    async def wait_for_targets(self, count: int) -> None:
        """Wait until each version has answered so many requests, also those without a route."""

        async def enough() -> bool:
            return min(self.old.arrivals, self.new.arrivals) >= count

        await eventually_async(enough, description=f"{count} requests arrive")

    async def wait_for_requests_with(self, accept: str) -> None:
        async def has_arrived() -> bool:
            return all(
                any(headers.get("accept") == accept for _, _, headers in version.requests)
                for version in (self.old, self.new)
            )

        await eventually_async(has_arrived, description=f"the request that accepts {accept} arrives")

    async def wait_for_pairs(self, count: int) -> None:
        async def is_committed() -> bool:
            return bool(query_value(self.settings.postgres_url, "select count(*) from abreast.pair") >= count)

        await eventually_async(is_committed, description=f"{count} pairs are in the ledger")

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
        async with run_worker(settings):
            yield Bench(settings, old, new)


async def test_recheck_detects_drift_and_counts_it_separately(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url) as rig:
        rig.old.stock = rig.new.stock = 4
        pair = rig.send({"stock": 5}, {"stock": 4})

        async def has_drift() -> bool:
            return bool(query_value(postgres_url, "select coalesce(sum(drift_count), 0) from abreast.finding"))

        await eventually_async(has_drift, description="it is told")
        method, path, headers = rig.old.requests[0]
        captures = stats(redis_url)["received"]

    await classify(postgres_url)
    database = Database(postgres_url)
    await database.open()
    explained = (await LedgerReader(database).list_findings(FindingFilter(only_explained=True), PageRequest(10))).rows
    findings = (await LedgerReader(database).list_findings(FindingFilter(), PageRequest(10))).rows
    today = FindingFilter(only_explained=True, window=Window(datetime.now(UTC) - timedelta(hours=1)))
    in_window = (await LedgerReader(database).list_findings(today, PageRequest(10))).rows
    detail = await LedgerReader(database).get_pair(pair)
    await database.close()

    hourly_counts_match_pairs(postgres_url)
    assert rig.stock(pair) == (False, True)
    assert query_value(postgres_url, "select count from abreast.finding where path = '$.stock'") == 0
    assert "drift of state" in query_value(postgres_url, "select reason from abreast.pair")
    assert [finding.path for finding in findings if finding.path == "$.stock"] == []
    (stock,) = (finding for finding in explained if finding.path == "$.stock")
    assert [(explanation.cause, explanation.pairs) for explanation in stock.explanations] == [("drift", 1)]
    assert "$.stock" in {finding.path for finding in in_window}
    assert (
        detail.pair.drift,
        [difference.is_drift for difference in detail.differences if difference.path == "$.stock"],
    ) == ((stock.id,), [True])
    assert (method, path, headers["x-abreast-recheck"]) == ("GET", "/products/7", "1")
    assert captures == 2  # only rechecks; the middleware sent no such request


async def test_recheck_keeps_finding_of_an_occasional_error(redis_url: str, postgres_url: str) -> None:
    """In each recheck its response is right, whether or not the state changed meanwhile."""
    async with bench(redis_url, postgres_url) as rig:
        still = [rig.send({"stock": 5}, {"stock": 0}) for _ in range(5)]
        await rig.wait_for_rechecks(5)
        rig.old.stock = rig.new.stock = 4
        moved = [rig.send({"stock": 5}, {"stock": 0}) for _ in range(5)]
        await rig.wait_for_rechecks(10)
        drifting = rig.send({"stock": 5}, {"stock": 4})

        async def has_drift() -> bool:
            return rig.stock(drifting) == (False, True)

        await rig.wait_for_pairs(11)
        await eventually_async(has_drift, description="the drift among them is told")

    assert [rig.stock(pair) for pair in (*still, *moved)] == [(True, False)] * 10
    assert query_value(postgres_url, "select count from abreast.finding where path = '$.stock'") == 10


async def test_recheck_skips_unsafe_and_unrepeatable_requests(redis_url: str, postgres_url: str) -> None:
    secret = (("authorization", "hmac:0123456789abcdef"),)
    async with bench(redis_url, postgres_url) as rig:
        rig.send({"stock": 5}, {"stock": 4}, method="POST")
        rig.send({"stock": 5}, {"stock": 4}, headers=secret)
        rig.send({"stock": 5}, {"stock": 4}, headers=(("if-none-match", "a"),))
        await rig.wait_for_pairs(3)
        rig.send({"stock": 5}, {"stock": 4}, headers=(("accept-language", "de"),))
        await rig.wait_for_rechecks(1)

    assert {headers["accept-language"] for _, _, headers in rig.old.requests} == {"de"}


async def test_recheck_respects_limit_per_minute(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=2) as rig:
        for _ in range(20):
            rig.send({"stock": 5}, {"stock": 4})
        await rig.wait_for_rechecks(2)
        await rig.wait_for_pairs(20)
        await asyncio.wait_for(asyncio.shield(asyncio.create_task(_turns(5))), 10)

    assert len(rig.new.requests) == 2  # one for each recheck or retest


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(AFTER / 4)  # turns of its loop, in which a third could begin


async def test_recheck_of_hanging_version_delays_no_worker(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url) as rig:
        rig.old.gate = asyncio.Event()
        rig.send({"stock": 5}, {"stock": 4})

        async def hanging() -> bool:
            return bool(rig.old.requests)

        await eventually_async(hanging, description="old is asked")
        for _ in range(50):
            rig.send({"stock": 5}, {"stock": 5})
        await rig.wait_for_pairs(51)

        assert not rig.new.requests  # old has not answered yet
        rig.old.gate.set()


async def wait_for_counter(rig: Bench, counter: str, count: int) -> None:
    query = f"select coalesce(sum({counter}), 0) from abreast.finding where path = '$.stock'"  # noqa: S608  # ours

    async def is_counted() -> bool:
        return bool(query_value(rig.settings.postgres_url, query) >= count)

    await eventually_async(is_counted, description=f"{counter} is {count}")


async def classify(postgres_url: str) -> None:
    database = Database(postgres_url)
    await database.open()
    async with database.connection() as connection:
        await classify_findings(connection)
    await database.close()


async def assert_retests_end(rig: Bench) -> None:
    """Assert that new gets at most one more retest that had begun, one that fails, and none during six intervals."""
    begun = len(rig.new.requests) + 2
    await asyncio.sleep(8 * RETEST_S)
    ended = len(rig.new.requests)
    await asyncio.sleep(6 * RETEST_S)

    assert len(rig.new.requests) == ended <= begun


@pytest.fixture
def short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a client bet more often. Retests follow each other as quickly."""
    monkeypatch.setattr(samples, "BET_PERIOD_MS", int(RETEST_S * 1000))
    monkeypatch.setattr(recheck, "RETEST_INTERVAL_S", RETEST_S)


@pytest.mark.usefixtures("short_periods")
async def test_retests_settle_a_difference_that_one_pair_shows(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=600) as rig:
        rig.new.stock = 4
        for _ in range(40):
            rig.send({"stock": 5}, {"stock": 5})
        rig.send({"stock": 5}, {"stock": 4})
        await wait_for_counter(rig, "other_only", 12)
        await classify(postgres_url)
        arrived = len(rig.new.requests)
        await asyncio.sleep(6 * RETEST_S)

        assert len(rig.new.requests) <= arrived + 1, "a decided finding is not retested, except by one on its way"
    [(state, reason, count)] = rows(
        postgres_url, "select state, reason, count from abreast.finding where path = '$.stock'"
    )
    assert (state, count) == ("real", 1)
    assert "only the other version's differs in" in reason
    assert len({headers["host"] for version in (rig.old, rig.new) for _, _, headers in version.requests}) <= 2


@pytest.mark.usefixtures("short_periods")
async def test_retests_of_noise_prove_nothing(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=600) as rig:
        rig.old.noise = rig.new.noise = random.Random(7)
        rig.send({"stock": 5}, {"stock": 4})
        await wait_for_counter(rig, "other_only + same_only", 8)
        await classify(postgres_url)

    [(state,)] = rows(postgres_url, "select state from abreast.finding where path = '$.stock'")
    assert state == "noise"


@pytest.mark.usefixtures("short_periods")
async def test_retests_of_a_version_that_is_often_wrong_do_not_show_noise(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=600) as rig:
        rig.new.noise = random.Random(7)
        rig.send({"stock": 5}, {"stock": 9})
        await wait_for_counter(rig, "other_only", 4)
        await classify(postgres_url)

    [(state, same_only)] = rows(postgres_url, "select state, same_only from abreast.finding where path = '$.stock'")
    assert (state, same_only) == ("undecided", 0)


@pytest.mark.usefixtures("short_periods")
async def test_retests_end_at_a_status_above_500(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=600) as rig:
        rig.new.stock = 4
        rig.send({"stock": 5}, {"stock": 4})
        await wait_for_counter(rig, "other_only", 2)
        rig.new.status = 503
        await assert_retests_end(rig)


@pytest.mark.usefixtures("short_periods")
async def test_version_that_does_not_respond_is_not_retested(
    redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recheck, "REPLAY_TIMEOUT_S", 2 * RETEST_S)
    async with bench(redis_url, postgres_url, recheck_per_minute=600) as rig:
        rig.new.stock = 4
        rig.send({"stock": 5}, {"stock": 4})
        await wait_for_counter(rig, "other_only", 2)
        rig.new.gate = asyncio.Event()
        await assert_retests_end(rig)
        rig.new.gate.set()


@pytest.mark.usefixtures("short_periods")
async def test_retests_respect_the_limit_per_minute(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url, recheck_per_minute=8) as rig:
        rig.new.stock = 4
        rig.send({"stock": 5}, {"stock": 4})
        await rig.wait_for_rechecks(8)
        await asyncio.sleep(6 * RETEST_S)

        assert len(rig.new.requests) == 8  # one for the recheck and for each of 7 retests


@asynccontextmanager
async def foreign_server() -> AsyncIterator[tuple[int, list[bytes]]]:
    """Yield the port of a server that no recheck may reach, and the bytes that arrive there."""
    arrived: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], arrived


async def test_recheck_never_leaves_its_host(redis_url: str, postgres_url: str) -> None:
    async with foreign_server() as (port, arrived), bench(redis_url, postgres_url) as rig:
        foreign = f"127.0.0.1:{port}"
        refused = [
            f"@{foreign}/x",
            f":x@{foreign}/x",
            foreign,
            f"http://{foreign}/x",
            f"\\\\{foreign}/x",
            f".{foreign}",
        ]
        kept = [f"//{foreign}/x", f"/\\{foreign}/x", f"/@{foreign}/x", f"/http://{foreign}/x", f"/..//{foreign}/x"]
        broken = [f"/x HTTP/1.1\r\nHost: {foreign}\r\n\r\n", f"/x\n{foreign}", f"/x?@{foreign}#@{foreign}"]
        for path in (*refused, *kept, *broken):
            rig.send({"stock": 5}, {"stock": 4}, path=path)
        rig.send({"stock": 5}, {"stock": 4}, query=f"a=1#@{foreign}")
        await rig.wait_for_pairs(len(refused) + len(kept) + len(broken) + 1)
        await rig.wait_for_targets(len(kept))
        rig.send({"stock": 5}, {"stock": 4}, headers=(("X-Abreast-Role", "shadow"), ("accept", "last")))
        await rig.wait_for_requests_with("last")

        reasons = rows(postgres_url, "select distinct reason from abreast.dead_letter")
        assert reasons == [("a capture is damaged: its path must begin with /",)]
        assert query_value(postgres_url, "select count(*) from abreast.dead_letter") == len(refused)
        assert arrived == []
        for version in (rig.old, rig.new):
            assert "x-abreast-role" not in version.requests[-1][2]


async def test_recheck_follows_no_redirect_and_keeps_no_cookie(redis_url: str, postgres_url: str) -> None:
    async with foreign_server() as (port, arrived), bench(redis_url, postgres_url) as rig:
        rig.old.location = rig.new.location = f"http://127.0.0.1:{port}/x"
        for name in ("first", "last"):
            rig.send({"stock": 5}, {"stock": 4}, headers=(("accept", name),))
            await rig.wait_for_requests_with(name)

        assert arrived == []
        assert not any("cookie" in headers for _, _, headers in (*rig.old.requests, *rig.new.requests))


async def test_recheck_sends_request_of_old_to_both_versions(redis_url: str, postgres_url: str) -> None:
    async with bench(redis_url, postgres_url) as rig:
        old, new = pair_of({"stock": 5}, {"stock": 4})
        forged = replace(new.request, method="POST", path="/products/9", headers=(("accept", "forged"),))
        send(rig.settings.redis_url, [old, replace(new, request=forged)])
        await rig.wait_for_rechecks(1)

    assert {(method, path) for method, path, _ in rig.new.requests} == {("GET", "/products/7")}


def test_recheck_settings_need_both_addresses() -> None:
    with pytest.raises(SettingError, match="ABREAST_RECHECK_OLD_URL and ABREAST_RECHECK_NEW_URL"):
        RecheckSettings.from_settings(Settings(recheck_per_minute=10))
    assert RecheckSettings.from_settings(Settings()) is None
