"""One order passes through Envoy, both versions, their caches and databases, and the pair lists each step."""

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

pytestmark = pytest.mark.xdist_group("spans")  # share the module's servers

ABREAST = Path(sys.executable).with_name("abreast")


@dataclass(frozen=True)
class Order:
    shop: ShopDeployment
    response: httpx.Response
    pair: dict[str, Any]
    output: str  # printed by `abreast pair`
    log: list[dict[str, Any]]  # access log of Envoy

    def capture(self, version: str) -> dict[str, Any]:
        captures = {capture["version"]: dict(capture) for capture in self.pair["captures"]}
        return captures[f"VERSION_{version.upper()}"]

    def span(self, version: str, kind: str, name: str) -> dict[str, Any]:
        (span,) = [row for row in self.capture(version)["spans"] if (row["kind"], row["name"]) == (kind, name)]
        return dict(span)

    def count_orders(self, version: str) -> int:
        with psycopg.connect(self.shop.database.url(f"shop_{version}")) as database:
            row = database.execute("select count(*) from placed_order").fetchone()
        assert row is not None
        return int(row[0])

    def count_shadow_responses(self) -> int:
        """Return how many responses of new to shadow requests Envoy received."""
        name = "cluster.new_shadow.upstream_rq_201"
        url = f"{self.shop.stack.admin_url}/stats?filter=^{name}$"
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310  # http
            return int(response.read().decode().rpartition(":")[2] or 0)


@pytest.fixture(scope="module")
def order() -> Iterator[Order]:
    addresses = StackAddresses(*(SocketAddress(LOOPBACK, port) for port in free_ports(3)))
    with deploy_shop(
        addresses, lambda _line: None, plain_versions=(), sample_unsafe=1.0, baseline_share=0.0, access_log=True
    ) as shop:
        stack = shop.stack
        response = httpx.post(
            f"{stack.envoy_url}/orders",
            json={"product": 3, "quantity": 2},
            headers={USER_HEADER: "ann"},
            trust_env=False,
        )
        pair: dict[str, Any] = {}

        def is_stored() -> bool:
            output = run(stack, response.headers["x-abreast-pair"], "--json")
            pair.update(json.loads(output)["pair"] if output else {})
            return len(pair.get("captures", ())) == 2

        eventually(is_stored, description="the pair is in the ledger")
        log = stack.data_directory.path / "envoy" / "envoy.log"

        def read_log() -> list[dict[str, Any]]:
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            return [line for line in map(json.loads, lines) if line["path"] == "/orders"]

        eventually(lambda: bool(read_log()), description="Envoy writes its log")
        yield Order(shop, response, pair, run(stack, pair["pair"]["id"]), read_log())


def run(stack: Stack, pair: str, *options: str) -> str:
    command = [str(ABREAST), "pair", pair, "--address", stack.grpc_address, *options]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return process.stdout if process.returncode == 0 else ""


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_envoy_receives_the_order_once(order: Order) -> None:
    assert [(line["method"], line["path"]) for line in order.log] == [("POST", "/orders")]


@pytest.mark.parametrize(("version", "role"), [("old", "ROLE_LIVE"), ("new", "ROLE_SHADOW")])
def test_both_versions_receive_the_order(order: Order, version: str, role: str) -> None:
    capture = order.capture(version)

    assert capture["role"] == role
    assert capture["start_time"]


@pytest.mark.parametrize("version", ["old", "new"])
def test_cache_lookup_is_a_span_of_both_versions(order: Order, version: str) -> None:
    span = order.span(version, "cache", "product")

    assert 0 < seconds(span["start"]) < seconds(order.capture(version)["total"])
    assert seconds(span["duration"]) > 0
    assert span["note"] in ({"miss"} if version == "old" else {"hit", "miss"})


@pytest.mark.parametrize("version", ["old", "new"])
def test_database_write_is_a_span_of_both_versions(order: Order, version: str) -> None:
    span = order.span(version, "database", "insert placed_order")
    cache = order.span(version, "cache", "product")

    assert seconds(span["start"]) >= seconds(cache["start"]) + seconds(cache["duration"])
    assert seconds(span["start"]) + seconds(span["duration"]) <= seconds(order.capture(version)["total"])


def test_user_receives_the_response_of_old(order: Order) -> None:
    assert order.response.status_code == 201
    assert order.response.headers["x-abreast-version"] == "old"
    assert [(line["status"], line["bytes_sent"]) for line in order.log] == [(201, len(order.response.content))]
    assert order.count_orders("old") == 1


def test_envoy_drops_the_response_of_new(order: Order) -> None:
    capture = order.capture("new")

    assert capture["status"] == 201
    assert order.count_shadow_responses() == 1
    assert len(order.log) == 1, "the user receives one response"
    assert order.count_orders("new") == 0


def test_pair_command_shows_spans_as_a_timeline(order: Order) -> None:
    timeline = order.output[order.output.rindex("arrived") :].splitlines()
    steps = [line.split("  ")[0].strip() for line in map(str.strip, timeline)]
    old, new = steps.index("old live"), steps.index("new shadow")
    old_rows, new_rows = (steps[old:new], steps[new:]) if old < new else (steps[old:], steps[new:old])

    for rows in (old_rows, new_rows):
        assert rows.index("→ cache product") < rows.index("→ database insert placed_order")
    assert "dropped by Envoy" in timeline[new]
    assert "dropped by Envoy" not in timeline[old]
