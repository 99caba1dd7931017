"""Both versions of the shop as processes, each with a separate database, and with one cache."""

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

pytestmark = pytest.mark.xdist_group("demo_service")  # share the module's servers

REQUESTS = 400  # four decks
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
VERSIONS: tuple[Version, ...] = ("old", "new")


@dataclass(frozen=True)
class Shops:
    clients: dict[Version, httpx.Client]
    databases: dict[Version, str]
    redis_url: str

    def get(self, version: Version, path: str, **headers: str) -> httpx.Response:
        return self.clients[version].get(
            path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


@pytest.fixture(scope="module")
def shops(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shops]:
    folder = tmp_path_factory.mktemp("shops")
    names = {version: f"shop_{version}_{uuid.uuid4().hex}" for version in VERSIONS}
    databases = {version: postgres_server.url(name) for version, name in names.items()}
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin, RedisServer() as server:
        for name in names.values():
            admin.execute(f"create database {name}".encode())
        shops = {version: start_shop(version, databases[version], server.url, folder) for version in VERSIONS}
        clients = {version: httpx.Client(base_url=url, trust_env=False) for version, (url, _) in shops.items()}
        try:
            yield Shops(clients, databases, server.url)
        finally:
            for version in VERSIONS:
                clients[version].close()
                shops[version][1].stop()
            for name in names.values():
                admin.execute(f"drop database {name} with (force)".encode())


def start_shop(version: str, database: str, redis_url: str, folder: Path, cache: str = "") -> tuple[str, ServerProcess]:
    port = find_free_port()
    process = ServerProcess.start(
        f"shop {version}",
        [sys.executable, "-m", "abreast_demo.service", "--version", version, "--listen", f"127.0.0.1:{port}"],
        folder / f"{version}-{port}.log",
        is_ready=lambda _pid: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"),
        environment={"DATABASE_URL": database, "CACHE_URL": cache or redis_url, "ABREAST_REDIS_URL": redis_url},
    )
    return f"http://127.0.0.1:{port}", process


def build_capture(version: Version, path: str, response: httpx.Response) -> Capture:
    path, _, query = path.partition("?")
    route = re.sub(r"/categories/\w+", "/categories/{slug}", path)
    route = re.sub(r"/products/\d+", "/products/{product_id}", route)
    headers = tuple((name.lower(), value) for name, value in response.headers.multi_items())
    return Capture(
        pair="p",
        service="shop",
        version=version,
        role="live" if version == "old" else "shadow",
        request=Request("GET", path, query, route),
        answer=Answer(response.status_code, headers, Body(response.content, len(response.content))),
    )


def test_versions_differ_exactly_where_planted(shops: Shops) -> None:
    paths = {request.path for request in itertools.islice(generate_requests(7), REQUESTS) if request.is_safe}
    locations = set()
    for path in sorted(paths):
        result = compare_pair(
            [build_capture(version, path, shops.get(version, path)) for version in VERSIONS], CompareOptions()
        )
        locations |= {
            FindingLocation(f"{result.method} {result.route}", difference.part, difference.path, difference.kind)
            for difference in result.differences
        }

    assert locations == {
        change.location
        for change in (*PLANTED_REGRESSIONS, *PLANTED_ADDITIONS, *PLANTED_NOISE)
        if change.location.part != "latency"
    }


def test_old_differs_from_itself_exactly_in_planted_noise(shops: Shops) -> None:
    locations = set()
    for request in itertools.islice((request for request in generate_requests(8) if request.is_safe), 100):
        captures = [build_capture("old", request.path, shops.get("old", request.path)) for _ in range(2)]
        result = compare_pair(captures, CompareOptions())
        locations |= {
            FindingLocation(f"GET {result.route}", difference.part, difference.path, difference.kind)
            for difference in result.noise
        }

    assert locations == {change.location for change in PLANTED_NOISE}


def test_new_truncates_only_prices_in_yen(shops: Shops) -> None:
    differing_prices = set()
    for product, currency in itertools.product(range(1, 121, 3), ("EUR", "USD", "GBP", "JPY")):
        path = f"/products/{product}/price?currency={currency}"
        old, new = (shops.get(version, path).json()["amount"] for version in VERSIONS)
        if old != new:
            assert old - new == 1
            differing_prices.add((product, currency))

    assert {currency for _, currency in differing_prices} == {"JPY"}
    assert 12 <= len(differing_prices) <= 28


def test_new_takes_longer_to_search(shops: Shops) -> None:
    times_s: dict[str, list[float]] = {version: [] for version in VERSIONS}
    for _ in range(7):
        for version in VERSIONS:
            times_s[version].append(shops.get(version, "/search?q=tent").elapsed.total_seconds())

    assert statistics.median(times_s["new"]) - statistics.median(times_s["old"]) >= 0.07


def test_versions_share_the_cache(shops: Shops) -> None:
    with psycopg.connect(shops.databases["new"], autocommit=True) as database:
        database.execute("insert into product values (901, 'Only in new', 'toys', 700, 1)")

    assert shops.get("new", "/products/901").json()["name"] == "Only in new"
    assert shops.get("old", "/products/901").json()["name"] == "Only in new"


def test_order_is_stored_only_by_the_version_that_answered(shops: Shops) -> None:
    for version in VERSIONS:
        response = shops.clients[version].post("/orders", json={"product": 3, "quantity": 2})
        order_id = uuid.UUID(response.json()["order"])

        assert response.status_code == 201
        assert [holder for holder in VERSIONS if order_id in list_order_ids(shops, holder)] == [version]


def list_order_ids(shops: Shops, version: Version) -> set[uuid.UUID]:
    with psycopg.connect(shops.databases[version]) as database:
        return {row[0] for row in database.execute("select id from placed_order")}


def test_versions_have_the_same_routes_through_mount_and_router(shops: Shops) -> None:
    pair = str(uuid.uuid4())
    for version, role in zip(VERSIONS, ("live", "shadow"), strict=True):
        response = shops.get(
            version,
            "/catalogue/categories/toys",
            x_abreast_pair=pair,
            x_abreast_copies="2",
            x_abreast_version=version,
            x_abreast_role=role,
        )
        assert response.headers["x-abreast-release"] == {"old": "shop-1.8", "new": "shop-2.0"}[version]

    with redis.Redis.from_url(shops.redis_url) as client:
        ready = Keys("shop", 0).ready
        eventually(lambda: client.xlen(ready) == 1, description="the pair is joined")
        ((_id, fields),) = client.xrange(ready)
    captures = [decode(blob) for field, blob in fields.items() if field.count(b":") == 2]
    assert [compare_pair(captures, CompareOptions()).route] == ["/catalogue/categories/{slug}"]
    assert len({capture.request.route for capture in captures}) == 1
    assert len(captures) == 2


def test_shop_works_without_its_cache(postgres_url: str, redis_url: str, tmp_path: Path) -> None:
    closed_url = f"redis://127.0.0.1:{find_free_port()}/0"
    url, process = start_shop("old", postgres_url, redis_url, tmp_path, cache=closed_url)
    try:
        response = httpx.get(f"{url}/products/1", trust_env=False)
    finally:
        process.stop()

    assert response.status_code == 200


async def test_shop_database_is_filled_once(postgres_url: str) -> None:
    counts = []
    for _ in range(2):
        database = ShopDatabase(postgres_url)
        await database.open()
        counts.append(await database.fetch_rows("stats"))
        await database.close()

    assert counts[0] == counts[1]
    assert counts[0][0]["products"] == 120


def test_service_names_a_missing_setting_in_one_line() -> None:
    command = [sys.executable, "-m", "abreast_demo.service", "--version", "old", "--listen", "127.0.0.1:1"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env={"CACHE_URL": "redis://x"})

    assert result.returncode == 1
    assert result.stderr == "shop: set DATABASE_URL\n"
