"""Captures that Envoy makes: two services without the middleware, and collectors that fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from abreast_sidecar.collector.server import Collector
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.jobs.reports import read_envoy
from abreast_sidecar.settings import CollectorSettings
from support import eventually, eventually_async, find_free_port
from support_envoy import Abreast, abreast
from support_up import Up, plain_service, run_up, service
from support_upstream import Received, Upstream, ok, respond

REQUESTS = 60
PAIR, ROLE, STATE, IN_FLIGHT, LENGTH, DIGEST = 2, 4, 7, 8, 16, 17  # places of fields in a capture


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with Up(find_free_port(), find_free_port()) as up, plain_service("old", up.old), plain_service("new", up.new):
        up.healthy()
        yield up


async def request_on_new_connections(proxy: Abreast) -> None:
    """Send four requests. Over several calls, they reach all threads of Envoy, while a connection stays on its thread."""
    await asyncio.gather(*[proxy.client.get("/", headers={"connection": "close"}) for _ in range(4)])


def get(up: Up, path: str, method: str = "GET") -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{up.listen}{path}", method=method)  # http
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  # http
        response.read()


def test_services_without_middleware_are_compared(up: Up) -> None:
    for number in range(20):
        get(up, f"/products/{number}")
    up.wait_for_pairs(20)

    eventually(lambda: up.json("status")["summary"].get("unaccounted") == "0", description="Envoy's count is read")
    summary = up.json("status")["summary"]
    [finding] = up.json("findings", "--each")["findings"]
    assert {entry["outcome"]: entry["count"] for entry in summary["outcomes"]} == {"OUTCOME_MISMATCH": "20"}
    assert (finding["endpoint"]["route"], finding["path"]) == ("/products/{id}", "$.price")
    assert summary["envoy_sampled"] == "20"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/large", 200),
        ("GET", "/stream", 200),
        ("GET", "/empty", 204),
        ("GET", "/unchanged", 304),
        ("HEAD", "/empty", 204),
        ("HEAD", "/shop", 200),
    ],
)
def test_responses_of_all_kinds_match(up: Up, method: str, path: str, status: int) -> None:
    pairs = int(up.json("status")["summary"]["pairs"])
    response = httpx.request(method, f"http://127.0.0.1:{up.listen}{path}")
    up.wait_for_pairs(pairs + 1)

    [pair, *_] = up.json("pairs")["pairs"]
    assert (pair["request"], pair["outcome"]) == (path, "OUTCOME_MATCH")
    assert (response.status_code, pair["old_status"], pair["new_status"]) == (status, status, status)


def test_copy_whose_connection_is_reset_is_only_old(up: Up) -> None:
    pairs = int(up.json("status")["summary"]["pairs"])
    assert httpx.get(f"http://127.0.0.1:{up.listen}/reset").status_code == 200
    up.wait_for_pairs(pairs + 1)

    [pair, *_] = up.json("pairs")["pairs"]
    assert (pair["request"], pair["outcome"], pair["old_status"]) == ("/reset", "OUTCOME_ONLY_OLD", 200)


def test_client_that_leaves_is_captured_without_another_request(up: Up) -> None:
    before = count_outcome(up, "OUTCOME_ABORTED")
    leave(up.listen)

    eventually(
        lambda: count_outcome(up, "OUTCOME_ABORTED") == before + 1, description="the pair is in the ledger as aborted"
    )
    [pair, *_] = up.json("pairs")["pairs"]
    assert (pair["request"], pair["new_status"]) == ("/stream", 200)


@pytest.mark.skipif(shutil.which("node") is None, reason="the service of docs/any-service.md needs node")
def test_service_of_the_documentation_is_compared(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "any-service.md").read_text()
    program = tmp_path / "shop.js"
    program.write_text(text.partition("```javascript\n")[2].partition("```")[0])
    with Up(find_free_port(), find_free_port()) as up, contextlib.ExitStack() as opening:
        for version, port in (("old", up.old), ("new", up.new)):
            process = subprocess.Popen(["node", program, version, str(port)])
            opening.callback(process.wait)
            opening.callback(process.terminate)
        up.healthy()
        for _ in range(20):
            get(up, "/")
        up.wait_for_pairs(20)

        [finding] = up.json("findings", "--each")["findings"]
        assert (finding["path"], finding["count"], finding["summary"]) == ("$.price", "20", '7.5 became "7.5"')


def leave(port: int) -> None:
    """Leave when the response has begun."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nhost: shop\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def count_outcome(up: Up, name: str) -> int:
    return sum(int(entry["count"]) for entry in up.json("status")["summary"]["outcomes"] if entry["outcome"] == name)


def test_identical_services_whose_bodies_wait_for_an_acknowledgement_do_not_fail() -> None:
    """The connections for the few baseline copies are rarely busy, so their bodies wait less."""
    with (
        Up(find_free_port(), find_free_port(), ("--baseline-share", "0.3", "--sample-safe", "1")) as up,
        plain_service("old", up.old, "nagle"),
        plain_service("old", up.new, "nagle"),
    ):
        up.healthy()
        for _ in range(600):
            get(up, "/products/7")
        up.wait_for_pairs(600)

        verdict = up.json("verdict", "--max-slower", "50%")
        endpoints = up.json("endpoints")["endpoints"]
        assert verdict["state"] != "VERDICT_STATE_FAIL", [reason["text"] for reason in verdict["reasons"]]
        assert all(float(entry["old_p50"].rstrip("s")) < 0.03 for entry in endpoints), endpoints


@pytest.mark.parametrize("capture", ["middleware", "off"])
def test_pair_does_not_wait_for_times_that_envoy_does_not_measure(capture: str) -> None:
    """Envoy learns from the first response that old has no middleware."""
    options = ("--baseline", "0", "--new-capture", capture)
    with Up(find_free_port(), find_free_port(), options) as up, contextlib.ExitStack() as opening:
        opening.enter_context(service("old", up.old, up.redis_url, "bare"))
        opening.enter_context(service("old", up.new, up.redis_url))
        up.healthy()
        for number in range(40):
            get(up, f"/products/{number}")
        up.wait_for_pairs(40)

        summary = up.json("status")["summary"]
        assert {entry["outcome"]: entry["count"] for entry in summary["outcomes"]} == {"OUTCOME_MATCH": "40"}
        assert int(summary["captures"].get("timed_out", 0)) == 0, summary["captures"]


@pytest.mark.parametrize("with_middleware", ["none", "new", "old"])
def test_identical_services_pass(with_middleware: str) -> None:
    options = ["--baseline", "0"]
    if with_middleware == "old":  # new answers no user, so Envoy can't learn that it has no middleware
        options += ["--new-capture", "envoy"]
    with Up(find_free_port(), find_free_port(), tuple(options)) as up, contextlib.ExitStack() as opening:
        for version, port in (("old", up.old), ("new", up.new)):
            words = [] if version == with_middleware else ["bare"]
            opening.enter_context(service("old", port, up.redis_url, *words))
        up.healthy()
        with ThreadPoolExecutor(2) as users:
            list(users.map(lambda _: get(up, "/slow"), range(400)))
        up.wait_for_pairs(400)

        eventually(lambda: up.json("status")["summary"].get("unaccounted") == "0", description="Envoy's count is read")
        budget = ("--max-mismatch", "5%", "--max-error", "5%", "--max-slower", "50%")
        verdict = up.json("verdict", *budget, "--wait", "30s")
        assert verdict["state"] == "VERDICT_STATE_PASS", [reason["text"] for reason in verdict["reasons"]]


def test_endpoints_of_a_service_without_framework_are_found(tmp_path: Path) -> None:
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps({"openapi": "3.1.0", "paths": {"/carts/{cart}": {}, "/carts/{cart": {}}}))
    settings = ("env", "ABREAST_ENDPOINTS=GET /towns/{town}", f"ABREAST_OPENAPI={document}")
    options = ("--baseline", "0", "--sample-unsafe", "100%")
    with (
        Up(find_free_port(), find_free_port(), options, before=settings) as up,
        plain_service("old", up.old),
        plain_service("new", up.new),
    ):
        up.healthy()
        for number in range(60):
            get(up, f"/shops/shop-number-{number}")
        for path in ("/towns/ulm", "/towns/bonn", "/towns/" + "x" * 16_000, "/carts/a", "/products/7"):
            get(up, path)
        for query in ("query Search { shops { name } }", "mutation Buy { buy { id } }", "{"):
            post(up, "/graphql", {"query": query})
        up.wait_for_pairs(68)

        expected = {
            "/shops/{id}": ("learned", 60, 1),
            "/towns/{town}": ("configured", 3, 0),
            "/carts/{cart}": ("openapi", 1, 0),
            "/products/{id}": ("path", 1, 1),
            "/graphql query Search": ("graphql", 1, 0),
            "/graphql mutation Buy": ("graphql", 1, 0),
            "/graphql": ("path", 1, 0),
        }
        eventually(lambda: list_endpoints(up) == expected, description=f"{expected}, got {list_endpoints(up)}")
        findings = up.json("findings", "--each")["findings"]
        assert {(finding["endpoint"]["route"], finding["path"], finding["count"]) for finding in findings} == {
            ("/shops/{id}", "$.open", "60"),
            ("/products/{id}", "$.price", "1"),
        }
        assert "GET /shops/{id} " in (output := up.command("endpoints").stdout)
        assert " learned " in output
        [problem] = [text for text in up.json("traffic")["warnings"] if "openapi.json" in text]
        assert "paths./carts/{cart: a parameter is a name in braces" in problem


def post(up: Up, path: str, content: object) -> None:
    body = json.dumps(content).encode()
    url = f"http://127.0.0.1:{up.listen}{path}"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # http
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  # http
        response.read()


def list_endpoints(up: Up) -> dict[str, tuple[str, int, int]]:
    """Return source, pairs and findings by route."""
    return {
        row["endpoint"]["route"]: (
            row["source"].removeprefix("ENDPOINT_SOURCE_").lower(),
            int(row["pairs"]),
            int(row["findings"]),
        )
        for row in up.json("endpoints")["endpoints"]
    }


def test_both_ways_of_capture_make_the_same_rows() -> None:
    with run_up("--baseline", "0") as up:
        by_middleware = collect_rows(up)
    with run_up("--baseline", "0", bare="old") as up:
        by_both = collect_rows(up)
        assert up.json("status")["summary"]["captures"]["duplicate"] == "0"
    with run_up("--baseline", "0", "--old-capture", "envoy", "--new-capture", "envoy", bare="both") as up:
        by_envoy = collect_rows(up)

    assert by_middleware == by_both == by_envoy
    assert ("/products/3", "/products/{id}", "OUTCOME_MISMATCH", 200, 200, ("$.price",)) in by_middleware


def test_version_with_captures_off_is_a_gap() -> None:
    with (
        Up(find_free_port(), find_free_port(), ("--baseline", "0", "--new-capture", "off")) as up,
        plain_service("old", up.old),
        plain_service("old", up.new),
    ):
        up.healthy()
        for number in range(5):
            get(up, f"/products/{number}")
        up.wait_for_pairs(5)

        eventually(lambda: up.json("status")["summary"].get("unaccounted") == "0", description="Envoy's count is read")
        assert count_outcome(up, "OUTCOME_ONLY_OLD") == 5
        verdict = up.json("verdict")
        assert verdict["state"] == "VERDICT_STATE_INCONCLUSIVE"
        texts = [reason["text"] for reason in verdict["reasons"]]
        assert any(text.startswith("old answered 5 requests, new none") for text in texts), texts
        assert any("0 of 5 sampled requests" in text for text in texts), texts
        checks = {(check["part"], check["name"]): check for check in up.json("doctor")["checks"]}
        assert checks["services", "new"]["found"] == "captures of new are off (ABREAST_NEW_CAPTURE)"
        assert not [check for check in checks.values() if check["state"] == "fail"], checks


async def test_envoy_captures_no_response_and_no_departure_of_a_version_with_captures_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.path != "/hangs":
            await ok(request, writer)

    collector = Collector(CollectorSettings(collector_listen=f"127.0.0.1:{find_free_port()}"))
    messages: list[bytes] = []

    def accept(_collector: Collector, message: bytes, _key: bytes) -> int:
        messages.append(message)
        return 202

    monkeypatch.setattr(Collector, "accept", accept)  # it needs no Redis
    await collector.start()
    address = SocketAddress("127.0.0.1", collector.port)
    async with abreast(old=(old := Upstream(answer)), old_capture="off", collector=address) as proxy:
        leaving = asyncio.create_task(proxy.client.get("/hangs"))
        await proxy.wait_for_requests(old, 1)
        leaving.cancel()
        for _ in range(10):
            assert (await proxy.client.get("/products/7")).status_code == 200

        async def are_captured() -> bool:
            return len(messages) >= 10

        await eventually_async(are_captured, description="the copies to new are captured")
        await proxy.give_new(1.0)
        proxy.new.answer = answer
        leaving = asyncio.create_task(proxy.client.get("/hangs"))
        await proxy.wait_for_requests(proxy.new, 11)
        leaving.cancel()

        async def is_logged() -> bool:
            return any(b" left " in message for message in messages)

        await eventually_async(is_logged, description="the client that left new is captured")
        fields = [message.split(b"\n")[0].split(b" ") for message in messages]
        assert {field[3] for field in fields} == {b"new"}
        assert all(request.pair for request in old.received)
    await collector.stop()


def collect_rows(up: Up) -> list[tuple[object, ...]]:
    paths = [f"/products/{number}" for number in range(12)] + ["/healthz", "/nowhere"]
    for path in paths:
        try:
            get(up, path)
        except urllib.error.HTTPError as error:
            error.read()  # a client that leaves delays the capture
    up.wait_for_pairs(len(paths))
    findings = {finding["id"]: finding["path"] for finding in up.json("findings", "--each")["findings"]}
    return sorted(
        (
            pair["request"],
            pair["endpoint"]["route"],
            pair["outcome"],
            pair["old_status"],
            pair["new_status"],
            tuple(sorted(findings[number] for number in pair["finding_ids"])),
        )
        for pair in up.json("pairs")["pairs"]
    )


@contextlib.contextmanager
def frozen_collector() -> Iterator[int]:
    """Listen without accepting: the kernel takes connections and bytes, as for a suspended process."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener.getsockname()[1]


@contextlib.asynccontextmanager
async def recording_collector(status: int = 202) -> AsyncIterator[tuple[int, list[list[str]]]]:
    """Serve a collector. Yield its port, and the fields of the captures that it receives."""
    captures: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                [size] = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                message = await reader.readexactly(int(size.partition(b":")[2]))
                captures.append(message.partition(b"\n")[0].decode().split(" "))
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % status)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], captures


async def check_users_and_counts(port: int) -> None:
    async with abreast(collector=SocketAddress("127.0.0.1", port)) as proxy:
        for _ in range(REQUESTS):
            assert (await proxy.client.get("/products/7")).status_code == 200

        async def is_accounted() -> bool:
            [counts] = [part.counts for part in await read_envoy(f"127.0.0.1:{proxy.settings.admin.port}")]
            return counts["captures_sent"] == counts["captures_undelivered"] == 2 * REQUESTS

        await eventually_async(is_accounted, description="each capture that is not delivered is counted")


async def test_users_get_every_response_if_the_collector_is_stopped() -> None:
    await check_users_and_counts(find_free_port())


async def test_users_get_every_response_if_the_collector_is_frozen() -> None:
    with frozen_collector() as port:
        await check_users_and_counts(port)


async def test_users_get_every_response_if_the_collector_responds_with_500() -> None:
    async with recording_collector(500) as (port, _):
        await check_users_and_counts(port)


async def test_captures_state_the_requests_that_wait_for_a_response() -> None:
    release = asyncio.Event()

    async def wait(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.path == "/slow" and request.role == "live":
            await release.wait()
        await ok(request, writer)

    async with (
        recording_collector() as (port, captures),
        abreast(old=(old := Upstream(wait)), collector=SocketAddress("127.0.0.1", port)) as proxy,
    ):
        slow = [asyncio.create_task(proxy.client.post("/slow")) for _ in range(8)]  # not sampled
        await proxy.wait_for_requests(old, 8)
        slow += [asyncio.create_task(proxy.client.get("/slow")) for _ in range(8)]
        await proxy.wait_for_requests(old, 16)
        release.set()
        await asyncio.gather(*slow)

        async def are_captured() -> bool:
            return len(captures) == 16

        await eventually_async(are_captured, description="the 8 sampled requests are captured in both versions")
        counts = [int(fields[IN_FLIGHT]) for fields in captures if fields[ROLE] == "live"]
        assert sum(counts) > sum(range(8))  # of two threads, and less without the requests that are not sampled

        release.clear()
        leaving = [asyncio.create_task(proxy.client.get("/slow")) for _ in range(8)]
        await proxy.wait_for_requests(old, 24)
        for task in leaving:
            task.cancel()

        async def is_idle() -> bool:
            captures.clear()
            await request_on_new_connections(proxy)
            return bool(captures) and not any(int(fields[IN_FLIGHT]) > 3 for fields in captures)

        await eventually_async(is_idle, description="requests whose client left do not wait any more")


async def test_live_response_that_breaks_off_is_captured() -> None:
    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.path == "/broken" and request.role == "live":
            writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\npart")
            await writer.drain()
            writer.close()
        else:
            await respond(writer, b"whole")

    async with (
        recording_collector() as (port, captures),
        abreast(old=Upstream(answer), new=Upstream(answer), collector=SocketAddress("127.0.0.1", port)) as proxy,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            await proxy.client.get("/broken")

        async def is_captured() -> bool:
            await request_on_new_connections(proxy)
            return "aborted" in {fields[STATE] for fields in captures}

        await eventually_async(is_captured, description="the part of the response is captured")
        [broken] = [fields for fields in captures if fields[STATE] == "aborted"]
        [copy] = [fields for fields in captures if fields[PAIR] == broken[PAIR] and fields is not broken]
        assert (broken[ROLE], broken[LENGTH]) == ("live", "4")
        assert (copy[ROLE], copy[LENGTH], copy[STATE]) == ("shadow", "5", "complete")


async def test_responses_outside_of_a_middleware_are_captured_by_envoy() -> None:
    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        is_marked = request.path == "/"
        headers = f"x-abreast-pair: {request.pair}\r\n" if is_marked else ""
        await respond(writer, b"any", 200 if is_marked else 401, headers=headers)

    async with (
        recording_collector() as (port, captures),
        abreast(old=Upstream(answer), new=Upstream(answer), collector=SocketAddress("127.0.0.1", port)) as proxy,
    ):
        refused = []
        for path in ["/", "/", "/refused", "/", "/refused", "/refused", "/"] * 5:
            response = await proxy.client.get(path)
            if path == "/refused":
                assert response.status_code == 401
                refused.append(path)
        admin = f"127.0.0.1:{proxy.settings.admin.port}"

        async def are_captured() -> bool:
            [counts] = [part.counts for part in await read_envoy(admin)]
            return len(captures) == counts["captures_sent"] == 2 * len(refused)

        await eventually_async(are_captured, description="Envoy captures what the middleware does not, and no more")
        assert {fields[STATE] for fields in captures} == {"complete"}


@pytest.mark.parametrize(
    ("size", "changed", "prefix", "is_same"),
    [
        (300_003, None, "envoy:", True),
        (300_003, 300_002, "envoy:", False),
        (300_003, 70_001, "envoy:", False),
        (9_000_000, None, "envoy:part:", True),
        (9_000_000, 8_999_999, "envoy:part:", True),  # after the hashed part
    ],
)
async def test_checksum_of_a_long_body_depends_on_its_bytes_only(
    size: int, changed: int | None, prefix: str, *, is_same: bool
) -> None:
    content = bytearray(random.Random(1).randbytes(size))
    other = content[:]
    if changed is not None:
        other[changed] ^= 1

    async def send(request: Received, writer: asyncio.StreamWriter) -> None:
        body, step = (content, 1 << 20) if request.role == "live" else (other, 99_991)  # chunks of other sizes
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % size)
        for start in range(0, size, step):
            writer.write(body[start : start + step])
            await writer.drain()

    async with (
        recording_collector() as (port, captures),
        abreast(old=Upstream(send), new=Upstream(send), collector=SocketAddress("127.0.0.1", port)) as proxy,
    ):
        assert len((await proxy.client.get("/")).content) == size

        async def are_captured() -> bool:
            return len(captures) == 2

        await eventually_async(are_captured, description="both responses are captured")
        old, new = (fields[DIGEST] for fields in captures)
        assert old.startswith(prefix)
        assert new.startswith(prefix)
        assert (old == new) == is_same
