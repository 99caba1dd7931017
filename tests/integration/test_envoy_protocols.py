"""Protocols through Envoy: websockets, TLS, HTTP/2, gRPC and HTTP/1.0; access to the admin interface."""

from __future__ import annotations

import asyncio
import json
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from support import eventually_async, find_free_port, free_ports
from support_certificate import Certificate, self_signed
from support_envoy import Abreast, abreast, exchange, started
from support_upstream import Received, Upstream, respond

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nhost: shop\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
NAME = "shop.internal"


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path, NAME)


async def test_websocket_reaches_version_of_user_and_is_not_mirrored() -> None:
    async with abreast() as proxy:
        await _assert_websocket_is_not_mirrored(proxy, proxy.old, proxy.new)
        await proxy.restart_with(new_share=1.0)
        await _assert_websocket_is_not_mirrored(proxy, proxy.new, proxy.old)


async def _assert_websocket_is_not_mirrored(proxy: Abreast, speaking: Upstream, silent: Upstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(HANDSHAKE)
    answer = await reader.readuntil(b"\r\n\r\n")
    frame = b"\x81\x85\x00\x00\x00\x00hello"
    writer.write(frame)
    echoed = await reader.readexactly(len(frame))
    writer.close()

    assert answer.startswith(b"HTTP/1.1 101")
    assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer  # RFC 6455, 1.3
    assert echoed == frame
    assert [request.pair for request in speaking.received] == [""]
    assert not silent.received


async def _answer_by_path(request: Received, writer: asyncio.StreamWriter) -> None:
    body, status = {"/body": (b"page", 200), "/empty": (b"", 204), "/refusal": (b"no", 403)}[request.path]
    await respond(writer, body, status)


@pytest.mark.parametrize(
    ("path", "status", "ignored"), [("/body", b"502", 1), ("/empty", b"204", 0), ("/refusal", b"403", 0)]
)
@pytest.mark.parametrize("weight", [0.0, 1.0])
async def test_ignored_websocket_is_an_error_that_is_counted(
    path: str, status: bytes, ignored: int, weight: float
) -> None:
    old, new = (Upstream(answer=_answer_by_path, accepts_websockets=False) for _ in range(2))
    async with abreast(old=old, new=new, weight=weight) as proxy:
        answer = await exchange(proxy.port, HANDSHAKE.replace(b"/ws", path.encode()), within=5.0)

        assert answer.startswith(b"HTTP/1.1 " + status)
        assert await proxy.stat("http.ingress.lua.websocket.ignored") == ignored


async def test_listener_accepts_tls_and_http2(certificate: Certificate) -> None:
    chain, key = str(certificate.certificate), str(certificate.key)
    async with abreast(tls_certificate=chain, tls_key=key) as proxy:
        trusting = ssl.create_default_context(cafile=certificate.certificate)
        trusting.set_alpn_protocols(["h2", "http/1.1"])
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, ssl=trusting, server_hostname=NAME)
        chosen = writer.get_extra_info("ssl_object").selected_alpn_protocol()
        writer.close()
        answer = await proxy.client.get("/")
        await proxy.wait_for_requests(proxy.new, 1)

        assert chosen == "h2"
        assert answer.status_code == 200
        assert proxy.old.received[0].headers["x-forwarded-proto"] == "https"
        assert proxy.new.received[0].headers["x-forwarded-proto"] == "https"
        assert b"HTTP/1.1 200" not in await exchange(proxy.port, b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")


async def test_tls_certificate_of_version_is_verified_by_name(certificate: Certificate) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    old = Upstream(tls=context)
    async with abreast(old=old, old_tls=NAME, old_ca=str(certificate.certificate)) as proxy:
        assert (await proxy.client.get("/")).status_code == 200
        await proxy.wait_for_requests(proxy.new, 1)

        listen, admin_port = free_ports(2)
        other = replace(
            proxy.settings,
            listen=SocketAddress("127.0.0.1", listen),
            admin=SocketAddress("127.0.0.1", admin_port),
            old_tls="someone.else",
        )
        async with started(other), httpx.AsyncClient(timeout=30) as client:
            assert (await client.get(f"http://127.0.0.1:{other.listen.port}/")).status_code == 503


async def grpc_shop(calls: list[dict[str, str]]) -> tuple[grpc.aio.Server, int]:
    """Yield the port of a gRPC service that records its calls, and the record."""

    async def say(request: bytes, context: Any) -> bytes:
        calls.append(dict(context.invocation_metadata()))
        context.set_trailing_metadata((("x-sum", "7"),))
        return request * 2

    async def count(request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for number in range(3):
            yield request + str(number).encode()

    server = grpc.aio.server()
    methods: dict[str, Any] = {
        "Say": grpc.unary_unary_rpc_method_handler(say),
        "Count": grpc.unary_stream_rpc_method_handler(count),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Shop", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


async def test_grpc_passes_with_trailers_and_can_be_mirrored() -> None:
    calls: list[dict[str, str]] = []
    (old, old_port), (new, new_port) = await grpc_shop(calls), await grpc_shop(calls)
    listen, admin_port, nobody = free_ports(3)
    settings = EnvoySettings(
        listen=SocketAddress("127.0.0.1", listen),
        admin=SocketAddress("127.0.0.1", admin_port),
        sidecar=SocketAddress("127.0.0.1", nobody),
        old=(SocketAddress("127.0.0.1", old_port),),
        new=(SocketAddress("127.0.0.1", new_port),),
        sample_unsafe=1.0,
        upstream_http2=True,
        health_path="tcp",
    )
    async with started(settings), grpc.aio.insecure_channel(f"127.0.0.1:{settings.listen.port}") as channel:
        say_it: Any = channel.unary_unary("/shop.Shop/Say")
        count_it: Any = channel.unary_stream("/shop.Shop/Count")
        call = say_it(b"ab")
        answer = await call
        trailers = dict(await call.trailing_metadata() or ())
        streamed = [part async for part in count_it(b"n")]

        async def mirrored() -> bool:
            return len(calls) == 2

        await eventually_async(mirrored, description="the copy arrived")

    await asyncio.gather(old.stop(None), new.stop(None))
    assert (answer, trailers["x-sum"]) == (b"abab", "7")
    assert streamed == [b"n0", b"n1", b"n2"]
    assert {(call["x-abreast-version"], call["x-abreast-role"]) for call in calls} == {
        ("old", "live"),
        ("new", "shadow"),
    }


async def test_http_1_0_is_supported() -> None:
    async with abreast() as proxy:
        answer = await exchange(proxy.port, b"GET / HTTP/1.0\r\n\r\n")

        assert answer.startswith(b"HTTP/1.0 200")
        assert answer.endswith(b"ok")


async def test_large_headers_pass() -> None:
    async with abreast() as proxy:
        answer = await proxy.client.get("/", headers={"cookie": "x" * 80_000})
        await proxy.wait_for_requests(proxy.new, 1)

        assert answer.status_code == 200
        assert proxy.new.received[0].headers["cookie"] == "x" * 80_000


async def test_response_passes_unchanged_except_for_version() -> None:
    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        headers = "server: shop\r\ndate: today\r\nset-cookie: a=1\r\nset-cookie: b=2\r\netag: W/1\r\n"
        await respond(writer, b"gone", 410, headers=headers)

    async with abreast(old=Upstream(answer=answer)) as proxy:
        response = await exchange(proxy.port, b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n", until=b"gone")

        assert response.decode() == (
            "HTTP/1.1 410 X\r\ncontent-length: 4\r\nserver: shop\r\ndate: today\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"
            "etag: W/1\r\nx-abreast-version: old\r\n\r\ngone"
        )


async def test_all_addresses_of_a_name_are_used() -> None:
    async with abreast() as proxy:
        listen, admin_port = free_ports(2)
        settings = replace(
            proxy.settings,
            listen=SocketAddress("127.0.0.1", listen),
            admin=SocketAddress("127.0.0.1", admin_port),
            old=(SocketAddress("localhost", proxy.old.port),),
            new=(SocketAddress("localhost", proxy.new.port),),
            sidecar=SocketAddress("localhost", proxy.sidecar.port),
        )
        async with started(settings), httpx.AsyncClient(timeout=30) as client:
            before = len(proxy.new.received)
            answer = await client.get(f"http://127.0.0.1:{settings.listen.port}/")
            await proxy.wait_for_requests(proxy.new, before + 1)

            assert answer.status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_admin_address_is_read_only(host: str) -> None:
    """A page in a browser can send POST to any loopback address. Only Envoy's user can open the socket."""
    async with abreast(admin=SocketAddress(host, find_free_port())) as proxy:
        read = {
            path: (await proxy.admin.get(path)).status_code
            for path in (
                "/ready",
                "/stats?filter=ingress",
                "/stats/prometheus",
                "/runtime",
                "/clusters",
                "/server_info",
            )
        }
        refused = {
            (method, path): (await proxy.admin.request(method, path)).status_code
            for method, path in (
                ("POST", "/quitquitquit"),
                ("POST", "/runtime_modify?abreast.weight.old=0"),
                ("POST", "/drain_listeners"),
                ("POST", "/stats"),
                ("POST", "/reset_counters"),
                ("POST", "/healthcheck/fail"),
                ("GET", "/config_dump"),
                ("GET", "/stats/../config_dump"),
                ("GET", "//config_dump"),
                ("GET", "/certs"),
                ("GET", "/"),
            )
        }
        socket = await asyncio.to_thread(Path(proxy.server.admin_socket).stat)

    assert set(read.values()) == {200}, read
    assert set(refused.values()) == {403}, refused
    assert stat.S_ISSOCK(socket.st_mode)
    assert stat.S_IMODE(socket.st_mode) == 0o600
    assert not await asyncio.to_thread(Path(proxy.server.admin_socket).exists)


async def test_access_log_is_json_without_query() -> None:
    async with abreast(access_log=True) as proxy:
        await proxy.client.get("/search?token=secret", headers={"user-agent": 'a "quoted" agent'})
        assert proxy.server.process is not None
        log = proxy.server.process.log_path

        async def has_log() -> bool:
            return '"path"' in log.read_text()

        await eventually_async(has_log, description="the request is in the log")
        [entry] = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]

        assert (entry["method"], entry["path"], entry["status"]) == ("GET", "/search", 200)
        assert (entry["route"], entry["version"]) == ("safe_sampled", "old")
        assert entry["pair"] == proxy.old.received[0].pair
        assert "secret" not in log.read_text()


async def test_envoy_logs_no_warning() -> None:
    async with abreast() as proxy:
        await proxy.client.get("/")
        assert proxy.server.process is not None

        lines = proxy.server.process.log_path.read_text().splitlines()
        assert [line for line in lines if "allow_custom_methods' is marked as work-in-progress" not in line] == []


async def test_compose_health_check_detects_dead_envoy() -> None:
    services = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text())["services"]
    _kind, *command = services["envoy"]["healthcheck"]["test"]

    async def check(port: int) -> int:
        arguments = [part.replace("9901", str(port)) for part in command]
        process = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.DEVNULL)
        return await process.wait()

    async with abreast() as proxy:
        assert await check(proxy.settings.admin.port) == 0
        assert await check(find_free_port()) != 0
