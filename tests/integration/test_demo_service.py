"""Both versions of the demo's shop as processes, each on a Postgres database of its own, with one cache."""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest
import redis

from abreast.protocol.capture import Answer, Body, Capture, Request, Version, decode
from abreast.protocol.join import Keys
from abreast_demo.load import generate_requests
from abreast_demo.planted_changes import PLANTED_ADDITIONS, PLANTED_NOISE, PLANTED_REGRESSIONS, FindingLocation
from abreast_demo.shop import ShopDatabase
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.stack.process import ServerProcess, is_answering
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from support import eventually, find_free_port

REQUESTS = 400  # four decks of traffic, which hold every kind of request
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
VERSIONS: tuple[Version, ...] = ("old", "new")


@dataclass(frozen=True)
class Shops:
    clients: dict[Version, httpx.Client]
    databases: dict[Version, str]
    redis_url: str

    def get(self, version: Version, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.clients[version].get(path, headers=named)


@pytest.fixture(scope="module")
def shops(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shops]:
    folder = tmp_path_factory.mktemp("shops")
    names = {version: f"shop_{version}_{uuid.uuid4().hex}" for version in VERSIONS}
    databases = {version: postgres_server.url(name) for version, name in names.items()}
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin, RedisServer() as server:
        for name in names.values():
            admin.execute(f"create database {name}".encode())
        started = {v: start(v, databases[v], server.url, folder) for v in VERSIONS}
        clients = {v: httpx.Client(base_url=url, trust_env=False) for v, (url, _process) in started.items()}
        try:
            yield Shops(clients, databases, server.url)
        finally:
            for version in VERSIONS:
                clients[version].close()
                started[version][1].stop()
            for name in names.values():
                admin.execute(f"drop database {name} with (force)".encode())


def start(version: str, database: str, redis_url: str, folder: Path, cache: str = "") -> tuple[str, ServerProcess]:
    port = find_free_port()
    process = ServerProcess.start(
        f"shop {version}",
        [sys.executable, "-m", "abreast_demo.service", "--version", version, "--listen", f"127.0.0.1:{port}"],
        folder / f"{version}-{port}.log",
        is_ready=lambda _pid: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"),
        environment={"DATABASE_URL": database, "CACHE_URL": cache or redis_url, "ABREAST_REDIS_URL": redis_url},
    )
    return f"http://127.0.0.1:{port}", process


def capture(version: Version, path: str, answer: httpx.Response) -> Capture:
    plain, _, query = path.partition("?")
    route = re.sub(r"/categories/\w+", "/categories/{slug}", plain)
    route = re.sub(r"/products/\d+", "/products/{product_id}", route)
    headers = tuple((name.lower(), value) for name, value in answer.headers.multi_items())
    return Capture(
        pair="p",
        service="shop",
        version=version,
        role="live" if version == "old" else "shadow",
        request=Request("GET", plain, query, route),
        answer=Answer(answer.status_code, headers, Body(answer.content, len(answer.content))),
    )


def test_the_versions_differ_where_it_was_planted_and_nowhere_else(shops: Shops) -> None:
    asked = {request.path for request in itertools.islice(generate_requests(7), REQUESTS) if request.is_safe}
    places = set()
    for path in sorted(asked):
        pair = [capture(version, path, shops.get(version, path)) for version in VERSIONS]
        judged = compare_pair(pair, CompareOptions())
        endpoint = f"{judged.method} {judged.route}"
        places |= {FindingLocation(endpoint, one.part, one.path, one.kind) for one in judged.differences}

    planted = {
        plant.location
        for plant in (*PLANTED_REGRESSIONS, *PLANTED_ADDITIONS, *PLANTED_NOISE)
        if plant.location.part != "latency"
    }
    assert places == planted


def test_what_is_noise_differs_within_old_too_and_nothing_else_does(shops: Shops) -> None:
    places = set()
    for request in itertools.islice((one for one in generate_requests(8) if one.is_safe), 100):
        first, again = (capture("old", request.path, shops.get("old", request.path)) for _ in range(2))
        judged = compare_pair([first, again], CompareOptions())
        places |= {FindingLocation(f"GET {judged.route}", one.part, one.path, one.kind) for one in judged.noise}

    assert places == {plant.location for plant in PLANTED_NOISE}


def test_yen_and_only_yen_are_cut(shops: Shops) -> None:
    different = set()
    for product, currency in itertools.product(range(1, 121, 3), ("EUR", "USD", "GBP", "JPY")):
        path = f"/products/{product}/price?currency={currency}"
        old, new = (shops.get(version, path).json()["amount"] for version in VERSIONS)
        if old != new:
            assert old - new == 1
            different.add((product, currency))

    assert {currency for _, currency in different} == {"JPY"}
    assert 12 <= len(different) <= 28


def test_new_takes_longer_to_search(shops: Shops) -> None:
    times = {version: [] for version in VERSIONS}  # type: dict[str, list[float]]
    for _ in range(7):
        for version in VERSIONS:
            times[version].append(shops.get(version, "/search?q=tent").elapsed.total_seconds())

    assert statistics.median(times["new"]) - statistics.median(times["old"]) >= 0.02


def test_what_one_version_cached_the_other_reads(shops: Shops) -> None:
    with psycopg.connect(shops.databases["new"], autocommit=True) as database:
        database.execute("insert into product values (901, 'Only in new', 'toys', 700, 1)")

    assert shops.get("new", "/products/901").json()["name"] == "Only in new"
    assert shops.get("old", "/products/901").json()["name"] == "Only in new"


def test_an_order_is_in_the_database_of_the_version_that_took_it(shops: Shops) -> None:
    for version in VERSIONS:
        answer = shops.clients[version].post("/orders", json={"product": 3, "quantity": 2})
        rows = {v: _orders(shops, v) for v in VERSIONS}
        placed = uuid.UUID(answer.json()["order"])

        assert answer.status_code == 201
        assert [holder for holder in VERSIONS if placed in rows[holder]] == [version]


def _orders(shops: Shops, version: Version) -> set[uuid.UUID]:
    with psycopg.connect(shops.databases[version]) as database:
        return {row[0] for row in database.execute("select id from placed_order")}


def test_both_name_their_routes_alike_through_mount_and_router(shops: Shops) -> None:
    pair = str(uuid.uuid4())
    for version, role in zip(VERSIONS, ("live", "shadow"), strict=True):
        answer = shops.get(
            version,
            "/catalogue/categories/toys",
            x_abreast_pair=pair,
            x_abreast_arms="2",
            x_abreast_version=version,
            x_abreast_role=role,
        )
        assert answer.headers["x-abreast-release"] == {"old": "shop-1.8", "new": "shop-2.0"}[version]

    with redis.Redis.from_url(shops.redis_url) as client:
        ready = Keys("shop", 0).ready
        eventually(lambda: client.xlen(ready) == 1, what="the pair is joined")
        ((_id, fields),) = client.xrange(ready)
    captures = [decode(blob) for slot, blob in fields.items() if slot.count(b":") == 2]
    assert [compare_pair(captures, CompareOptions()).route] == ["/catalogue/categories/{slug}"]
    assert len({one.request.route for one in captures}) == 1
    assert len(captures) == 2


def test_a_shop_without_its_cache_still_sells(postgres_url: str, redis_url: str, tmp_path: Path) -> None:
    nobody = f"redis://127.0.0.1:{find_free_port()}/0"
    url, process = start("old", postgres_url, redis_url, tmp_path, cache=nobody)
    try:
        answer = httpx.get(f"{url}/products/1", trust_env=False)
    finally:
        process.stop()

    assert answer.status_code == 200


async def test_a_second_start_changes_nothing(postgres_url: str) -> None:
    counts = []
    for _ in range(2):
        database = ShopDatabase(postgres_url)
        await database.open()
        counts.append(await database.fetch_rows("stats"))
        await database.close()

    assert counts[0] == counts[1]
    assert counts[0][0]["products"] == 120


def test_a_missing_setting_gets_one_line() -> None:
    command = [sys.executable, "-m", "abreast_demo.service", "--version", "old", "--listen", "127.0.0.1:1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={"CACHE_URL": "redis://x"})

    assert done.returncode == 1
    assert done.stderr == "shop: set DATABASE_URL\n"
