"""One order through everything: each of the thirteen hops, by Envoy's access log and by what both versions recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from abreast_demo.deploy import LOOPBACK, ShopDeployment, StackAddresses, deploy_shop
from abreast_demo.load import USER_HEADER
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.stack.stack import Stack
from support import eventually, free_ports

pytestmark = pytest.mark.xdist_group("hops")  # share the module's servers

ABREAST = Path(sys.executable).with_name("abreast")


@dataclass(frozen=True)
class Order:
    shop: ShopDeployment
    answer: httpx.Response
    pair: dict[str, Any]
    shown: str  # what `abreast pair` prints
    log: list[dict[str, Any]]  # Envoy's

    def capture(self, version: str) -> dict[str, Any]:
        (found,) = [one for one in self.pair["captures"] if one["version"] == f"VERSION_{version.upper()}"]
        return dict(found)

    def hop(self, version: str, kind: str, name: str) -> dict[str, Any]:
        (found,) = [one for one in self.capture(version)["hops"] if (one["kind"], one["name"]) == (kind, name)]
        return dict(found)

    def orders(self, version: str) -> int:
        with psycopg.connect(self.shop.database.url(f"shop_{version}")) as database:
            row = database.execute("select count(*) from placed_order").fetchone()
        assert row is not None
        return int(row[0])

    def copies(self) -> int:
        """Answers of new that Envoy got for copies."""
        name = "cluster.new_shadow.upstream_rq_201"
        url = f"{self.shop.stack.admin_url}/stats?filter=^{name}$"
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # http
            return int(answer.read().decode().rpartition(":")[2] or 0)


@pytest.fixture(scope="module")
def order() -> Iterator[Order]:
    addresses = StackAddresses(*(SocketAddress(LOOPBACK, port) for port in free_ports(3)))
    with deploy_shop(addresses, lambda _said: None, sample_unsafe=1.0, baseline_share=0.0, access_log=True) as shop:
        stack = shop.stack
        answer = httpx.post(
            f"{stack.envoy_url}/orders",
            json={"product": 3, "quantity": 2},
            headers={USER_HEADER: "ann"},
            trust_env=False,
        )
        pair: dict[str, Any] = {}

        def kept() -> bool:
            done = run(stack, answer.headers["x-abreast-pair"], "--json")
            pair.update(json.loads(done)["pair"] if done else {})
            return len(pair.get("captures", ())) == 2

        eventually(kept, what="the pair is in the ledger")
        log = stack.data_directory.path / "envoy" / "envoy.log"

        def logged() -> list[dict[str, Any]]:
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            return [line for line in map(json.loads, lines) if line["path"] == "/orders"]

        eventually(lambda: bool(logged()), what="Envoy writes its log")
        yield Order(shop, answer, pair, run(stack, pair["pair"]["id"]), logged())


def run(stack: Stack, pair: str, *options: str) -> str:
    command = [str(ABREAST), "pair", pair, "--address", stack.grpc_address, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_1_from_the_user_to_the_load_balancer(order: Order) -> None:
    assert [(line["method"], line["path"]) for line in order.log] == [("POST", "/orders")]


@pytest.mark.parametrize(("version", "role"), [("old", "ROLE_LIVE"), ("new", "ROLE_SHADOW")])
def test_2_and_3_from_the_load_balancer_to_both_versions(order: Order, version: str, role: str) -> None:
    capture = order.capture(version)

    assert capture["role"] == role
    assert capture["started"]


@pytest.mark.parametrize("version", ["old", "new"])
def test_4_5_9_and_10_to_the_cache_and_back(order: Order, version: str) -> None:
    hop = order.hop(version, "cache", "product")

    assert 0 < seconds(hop["start"]) < seconds(order.capture(version)["total"])
    assert seconds(hop["duration"]) > 0
    assert hop["note"] in ({"miss"} if version == "old" else {"hit", "miss"})


@pytest.mark.parametrize("version", ["old", "new"])
def test_6_7_11_and_12_to_the_database_and_back(order: Order, version: str) -> None:
    hop = order.hop(version, "database", "insert placed_order")
    cache = order.hop(version, "cache", "product")

    assert seconds(hop["start"]) >= seconds(cache["start"]) + seconds(cache["duration"])
    assert seconds(hop["start"]) + seconds(hop["duration"]) <= seconds(order.capture(version)["total"])


def test_8_from_old_to_the_user(order: Order) -> None:
    assert order.answer.status_code == 201
    assert order.answer.headers["x-abreast-version"] == "old"
    assert [(line["status"], line["bytes_sent"]) for line in order.log] == [(201, len(order.answer.content))]
    assert order.orders("old") == 1


def test_13_from_new_to_the_load_balancer_where_it_is_dropped(order: Order) -> None:
    capture = order.capture("new")

    assert capture["status"] == 201
    assert order.copies() == 1
    assert len(order.log) == 1, "the user got one answer"
    assert order.orders("new") == 0


def test_a_pair_shows_them_as_a_timeline(order: Order) -> None:
    timeline = order.shown[order.shown.rindex("arrived") :].splitlines()
    said = [line.split("  ")[0].strip() for line in map(str.strip, timeline)]
    old, new = said.index("old live"), said.index("new shadow")
    old_rows, new_rows = (said[old:new], said[new:]) if old < new else (said[old:], said[new:old])

    for rows in (old_rows, new_rows):
        assert rows.index("→ cache product") < rows.index("→ database insert placed_order")
    assert "dropped by Envoy" in timeline[new]
    assert "dropped by Envoy" not in timeline[old]
