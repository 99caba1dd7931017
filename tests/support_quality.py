"""Captures of the demo's real old shop, made by calling it in this process, and what the ledger says of them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from starlette.types import ASGIApp

from abreast.export.routes import RouteResolver
from abreast.protocol.capture import Answer, Body, Capture, Role, Version
from abreast.protocol.capture import Request as CapturedRequest
from abreast_demo import old
from abreast_demo.load import UserRequest, generate_requests
from abreast_demo.shop import Shop
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.jobs.detectors import detect_slowdowns
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.stats.verdict import Budget, Verdict
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest
from abreast_sidecar.store.records import Finding, PairRecord, Window
from abreast_sidecar.store.writer import PairWriter

SERVICE = "shop"
BATCH = 500
BASELINE = 0.3  # as in the demo
ENVOY = "insert into abreast.envoy_report (node, service, seen, totals, last_reading) values ('e', %s, now(), %s, '{}')"


class ReadOnce(Shop):
    """The shop, whose rows are read from the database once: 20,000 requests ask for a few hundred things."""

    def __init__(self, database_url: str) -> None:
        super().__init__(database_url, "redis://127.0.0.1:1/0")
        self.cache = _Kept()  # type: ignore[assignment]  # has the two methods that are called
        self._found: dict[str, list[Any]] = {}

    async def search(self, statement: str, pattern: str) -> list[Any]:
        if pattern not in self._found:
            self._found[pattern] = await super().search_products(statement, pattern)
        return self._found[pattern]


class _Kept:
    def __init__(self) -> None:
        self._rows: dict[str, Any] = {}

    async def get(self, key: str, load: Callable[[], Any]) -> Any:
        if key not in self._rows:
            self._rows[key] = await load()
        return self._rows[key]

    async def aclose(self) -> None:
        return


@asynccontextmanager
async def shop(database_url: str) -> AsyncIterator[ASGIApp]:
    serving = ReadOnce(database_url)
    await serving.open()
    app = old.build_starlette_app(serving)
    app.state.shop = serving
    try:
        yield app
    finally:
        await serving.close()


@dataclass
class Service:
    """Answers as the middleware would have captured them."""

    app: ASGIApp
    routes: RouteResolver

    async def capture(self, pair: str, request: UserRequest, version: Version, role: Role, arms: int) -> Capture:
        path, _, query = request.path.partition("?")
        scope: dict[str, Any] = {
            "type": "http",
            "method": request.method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(b"host", b"shop")],
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
        }
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        start_ns = time.perf_counter_ns()
        await self.app(scope, _nothing, send)
        duration_us = (time.perf_counter_ns() - start_ns) // 1000
        content = b"".join(message.get("body", b"") for message in messages[1:])
        headers = tuple((name.decode(), value.decode()) for name, value in messages[0]["headers"])
        return Capture(
            pair,
            SERVICE,
            version,
            role,
            CapturedRequest(request.method, path, query, self.routes.resolve(scope)),
            Answer(messages[0]["status"], headers, Body(content, len(content))),
            expected_captures=arms,
            release="shop-1.8",
            started_at=time.time(),
            total_us=duration_us,
            in_flight=0,
            wait_us=0,
        )


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


def safe_requests(count: int, seed: int = 1) -> list[UserRequest]:
    """Return the requests of the demo's users without orders, which are not mirrored."""
    return list(itertools.islice((request for request in generate_requests(seed) if request.is_safe), count))


async def capture_pairs(database_url: str, requests: Sequence[UserRequest]) -> list[list[Capture]]:
    """Old against old: what both answered, and for a share a baseline copy."""
    dice, pairs = random.Random(7), []
    async with shop(database_url) as app:
        service = Service(app, RouteResolver(app))
        for number, request in enumerate(requests):
            copies: list[tuple[Version, Role]] = [("new", "shadow")]
            if dice.random() < BASELINE:
                # Copies are sent together, so that either may be the first, which warms what the other needs.
                copies.insert(dice.randrange(2), ("old", "baseline"))
            pair, arms = f"pair-{number:06}", 1 + len(copies)
            pairs.append(
                [
                    await service.capture(pair, request, version, role, arms)
                    for version, role in [("old", "live"), *copies]
                ]
            )
    return pairs


def make_record(number: int, captures: Sequence[Capture]) -> PairRecord:
    moment = int(time.time() * 1000)
    return PairRecord(
        SERVICE, f"{moment}-{number}", moment, captures[0].pair, compare_pair(list(captures), CompareOptions()), ()
    )


@dataclass
class Looks:
    """Findings that were ever classified as real while the ledger filled, and their final states."""

    ever: set[str]
    findings: list[Finding]


def describe(finding: Finding) -> str:
    return f"{finding.endpoint.method} {finding.endpoint.route} {finding.part} {finding.path} {finding.kind}"


async def fill(url: str, batch: Sequence[PairRecord]) -> Looks:
    """Write as a worker does, and let housekeeping look after each batch."""
    ledger, database = PairWriter(url, examples_per_finding=3), Database(url)
    await database.open()
    queries, ever = LedgerReader(database), set()
    try:
        for offset in range(0, len(batch), BATCH):
            await ledger.write(batch[offset : offset + BATCH])
            async with database.connection() as connection:
                await classify_findings(connection)
                await detect_slowdowns(connection)
            ever |= {describe(finding) for finding in await _listed(queries) if finding.state == "real"}
        return Looks(ever, await _listed(queries))
    finally:
        await ledger.close()
        await database.close()


async def _listed(queries: LedgerReader) -> list[Finding]:
    return list((await queries.list_findings(FindingFilter(service=SERVICE), PageRequest(1000))).rows)


async def verdict(url: str, budget: Budget) -> Verdict:
    database = Database(url)
    await database.open()
    try:
        return await LedgerReader(database).read_verdict(SERVICE, Window(), budget, pending=0)
    finally:
        await database.close()


def envoy_counted(url: str, sampled: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(ENVOY.encode(), (SERVICE, f'{{"sampled": {sampled}}}'))
