"""TLS with client certificates, listeners beyond loopback, and Envoys that authenticate."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from abreast.v1 import comparison_pb2
from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.app import Sidecar
from abreast_sidecar.cli.doctor.services import check_security
from abreast_sidecar.client.sidecar_client import CREDENTIAL_VARIABLES, SidecarClient
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.errors import ServerError, SettingError, UnauthenticatedError
from abreast_sidecar.serve.services import WATCH_INTERVAL_S
from abreast_sidecar.settings import CollectorSettings, Settings
from abreast_sidecar.traffic.model import AuditNote
from support import eventually_async, find_free_port
from support_certificate import Certificate, self_signed
from support_edge import acknowledged, edge
from support_serve import QuerySidecar, run_sidecar

ADMIN_TOKEN, ENVOY_TOKEN = "a" * 32, "e" * 32
NAME = "localhost"
NOTE = AuditNote("test", "")


def tls_settings(server: Certificate, client: Certificate | None) -> dict[str, Any]:
    settings = {"tls_cert_file": str(server.certificate), "tls_key_file": str(server.key)}
    return settings | ({"tls_client_ca_file": str(client.certificate)} if client else {})


@pytest.mark.parametrize("needs_client", [False, True])
async def test_tls_protects_api_and_page(
    redis_url: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_client: bool
) -> None:
    server, client = self_signed(tmp_path, NAME), self_signed(tmp_path, "client")
    settings = tls_settings(server, client if needs_client else None)
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar, admin_token=ADMIN_TOKEN, **settings) as sidecar:
        link = SidecarClient(f"{NAME}:{sidecar.port}", 5.0)
        http_url = f"https://{NAME}:{sidecar.sidecar.http.port}"

        async def count_events() -> int:
            async with link.connect() as calls:
                return len((await calls.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(service="shop"))).events)

        def read_page(context: ssl.SSLContext) -> int:
            return httpx.get(f"{http_url}/healthz", verify=context).status_code

        sidecar.ledger().endpoint()
        with pytest.raises(ServerError):
            await count_events()  # without TLS
        monkeypatch.setenv("ABREAST_TLS_CA_FILE", str(server.certificate))
        monkeypatch.setenv("ABREAST_TOKEN_FILE", str(tmp_path / "token"))
        (tmp_path / "token").write_text(f"{ADMIN_TOKEN}\n")
        context = ssl.create_default_context(cafile=server.certificate)
        if needs_client:
            with pytest.raises(ServerError):
                await count_events()
            with pytest.raises(httpx.TransportError):
                await asyncio.to_thread(read_page, context)
            monkeypatch.setenv(CREDENTIAL_VARIABLES["cert_file"], str(client.certificate))
            monkeypatch.setenv(CREDENTIAL_VARIABLES["key_file"], str(client.key))
            context.load_cert_chain(client.certificate, client.key)
        assert await count_events() == 0
        assert await asyncio.to_thread(read_page, context) == 200
        (tmp_path / "token").write_text("x" * 40)
        with pytest.raises(UnauthenticatedError, match="not valid"):
            await count_events()


async def test_envoy_gets_settings_with_its_token_over_tls(redis_url: str, postgres_url: str, tmp_path: Path) -> None:
    server, client = self_signed(tmp_path, NAME), self_signed(tmp_path, "client")
    settings = tls_settings(server, client)
    async with (
        run_sidecar(redis_url, postgres_url, envoy_token=ENVOY_TOKEN, ready=False, **settings) as sidecar,
        edge(
            sidecar.port,
            sidecar_token=ENVOY_TOKEN,
            sidecar_tls=NAME,
            sidecar_ca=str(server.certificate),
            sidecar_cert=str(client.certificate),
            sidecar_key=str(client.key),
        ),
    ):
        await acknowledged(sidecar)


@pytest.mark.parametrize("token", ["env:EDGE_TOKEN", ENVOY_TOKEN, "w" * 32, ""])
async def test_fake_envoys_are_refused(redis_url: str, postgres_url: str, token: str) -> None:
    is_valid = token in {"env:EDGE_TOKEN", ENVOY_TOKEN}
    async with (
        run_sidecar(redis_url, postgres_url, envoy_token=ENVOY_TOKEN) as sidecar,
        edge(sidecar.port, environment={"EDGE_TOKEN": ENVOY_TOKEN}, sidecar_token=token) as envoy,
    ):
        if is_valid:
            await acknowledged(sidecar)
            return
        await asyncio.sleep(1.0)  # Envoy tries several times
        assert not sidecar.sidecar.control.connections.list_all()
        assert (await envoy.runtime())["abreast.weight.old"] == "10000"


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"grpc_listen": "0.0.0.0:0"}, "TLS and tokens"),
        ({"http_listen": "[::]:0"}, "TLS and tokens"),
        ({"grpc_listen": "10.1.2.3:1", "admin_token": ADMIN_TOKEN}, "TLS"),
        ({"grpc_listen": "sidecar:1", "tls_cert_file": "a", "tls_key_file": "b"}, "tokens"),
    ],
)
def test_listener_beyond_loopback_needs_tls_and_tokens(changes: dict[str, Any], missing: str) -> None:
    with pytest.raises(SettingError, match=f"must be on loopback without {missing}: set"):
        Settings(**changes)

    insecure = Settings(**changes, insecure=True)
    assert missing.replace(" and ", " and without ") in insecure.list_warnings()[0]
    assert not Settings(grpc_listen="[::1]:1", http_listen="localhost:1").list_warnings()


def test_collector_beyond_loopback_needs_a_key(redis_url: str, postgres_url: str) -> None:
    """TLS and tokens of the sidecar do not protect its collector."""
    protected: dict[str, Any] = {"tls_cert_file": "a", "tls_key_file": "b", "admin_token": ADMIN_TOKEN}
    settings = Settings(collector_listen="0.0.0.0:1", redis_url=redis_url, postgres_url=postgres_url, **protected)
    with pytest.raises(SettingError, match="must be on loopback without a key: set ABREAST_EDGE_KEY"):
        Sidecar(settings)

    assert not CollectorSettings(collector_listen="0.0.0.0:1", edge_key=("k" * 32,)).list_warnings()
    (warning,) = CollectorSettings(collector_listen="0.0.0.0:1", insecure=True).list_warnings()
    assert "without ABREAST_EDGE_KEY" in warning


def test_collector_command_without_a_key_exits_with_code_2() -> None:
    command = [sys.executable, "-m", "abreast_sidecar", "collector", "--collector-listen", "0.0.0.0:0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert result.returncode == 2, result.stderr
    assert "must be on loopback without a key: set ABREAST_EDGE_KEY" in result.stderr


@pytest.mark.parametrize("command", [["sidecar", "--http-listen", "0.0.0.0:0"], ["up", "--http", "0.0.0.0:8090"]])
def test_command_refuses_an_open_listener_with_exit_code_2(command: list[str]) -> None:
    versions = ["--old", "http://127.0.0.1:1", "--new", "http://127.0.0.1:2", "--service", "shop"]
    arguments = [*command, *(versions if command[0] == "up" else [])]
    result = subprocess.run(
        [sys.executable, "-m", "abreast_sidecar", *arguments], capture_output=True, text=True, check=False, timeout=60
    )

    assert result.returncode == 2, result.stderr
    assert "must be on loopback without TLS and tokens" in result.stderr


async def test_insecure_listener_is_a_warning_in_traffic(redis_url: str, postgres_url: str) -> None:
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar, insecure=True) as sidecar:
        sidecar.sidecar.control.warnings = Settings(grpc_listen="0.0.0.0:1", insecure=True).list_warnings()
        async with edge(sidecar.port):
            await acknowledged(sidecar)
            response = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())

    assert response.warnings == [
        "the sidecar listens beyond loopback without TLS and without tokens (ABREAST_INSECURE)"
    ]


async def test_connection_without_headers_is_closed(
    redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast_sidecar.serve.servers.HEADERS_TIMEOUT_S", 0.2)
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar) as sidecar:
        for start in (b"", b"GET / HTTP/1.1\r\nx-slow: "):
            reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.http.port)
            writer.write(start)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
        assert (await sidecar.http.get("/healthz")).status_code == 200


async def test_streams_of_one_address_are_limited(
    redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast_sidecar.serve.servers.MAX_STREAMS_PER_HOST", 3)
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar) as sidecar:
        sidecar.ledger().endpoint()
        await sidecar.sidecar.control.repository.ensure("shop", sidecar.sidecar.control.initial_shares["shop"], NOTE)
        watches = [sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest(service="shop")) for _ in range(3)]
        for watch in watches:
            assert await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest(service="shop")).read()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await sidecar.traffic.Rollback(pb.RollbackRequest(service="shop"))
        for watch in watches:
            watch.cancel()


@pytest.mark.parametrize("is_hardened", [False, True])
async def test_doctor_tries_the_doors(redis_url: str, postgres_url: str, is_hardened: bool) -> None:
    tokens: dict[str, Any] = {"admin_token": ADMIN_TOKEN, "envoy_token": ENVOY_TOKEN} if is_hardened else {}
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar, **tokens) as sidecar:
        http_url = f"http://127.0.0.1:{sidecar.sidecar.http.port}"
        checks = await asyncio.to_thread(
            lambda: list(check_security(f"127.0.0.1:{sidecar.port}", http_url, ["127.0.0.1:1"]))
        )

    states = {check.name: check.state for check in checks}
    door = "ok" if is_hardened else "warn"
    assert states == {"token": door, "envoys": door, "tls": "warn", "page": door, "host": "ok", "admin": "ok"}


async def test_watches_share_one_read(redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar) as sidecar:
        reader = sidecar.sidecar.reader
        read_marks, reads = reader.read_finding_marks, []

        async def count_reads(service: str) -> dict[int, tuple[Any, ...]]:
            reads.append(time.monotonic())
            return await read_marks(service)

        monkeypatch.setattr(reader, "read_finding_marks", count_reads)
        ledger = sidecar.ledger()
        finding = ledger.finding(ledger.endpoint(), "$.price", count=1)
        started_at = time.monotonic()
        watches: list[Any] = [
            sidecar.comparison.WatchFindings(comparison_pb2.WatchFindingsRequest(service="shop", include_noise=True))
            for _ in range(100)
        ]
        assert {(await watch.read()).finding.id for watch in watches} == {finding}
        ledger.execute("update abreast.finding set count = 2, last_seen = now() where id = %s", finding)
        assert {(await watch.read()).finding.count for watch in watches} == {2}
        assert len(reads) <= (time.monotonic() - started_at) / (WATCH_INTERVAL_S * 0.9) + 1
        for watch in watches:
            watch.cancel()


async def test_override_on_the_admin_interface_is_a_warning(redis_url: str, postgres_url: str) -> None:
    admin_port = find_free_port()
    admin = f"127.0.0.1:{admin_port}"
    async with (
        run_sidecar(redis_url, postgres_url, kind=QuerySidecar, envoy_admin=(admin,)) as sidecar,
        edge(sidecar.port, admin=SocketAddress("127.0.0.1", admin_port)) as envoy,
    ):
        await acknowledged(sidecar)
        before = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
        override = "/runtime_modify?abreast.weight.old=0&abreast.weight.new_or_old=10000"
        await asyncio.to_thread(envoy.server.ask_admin, "POST", override)
        warnings: list[str] = []

        async def is_reported() -> bool:
            warnings[:] = (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).warnings
            return bool(warnings)

        await eventually_async(is_reported, description="the override is reported")
        page = await sidecar.http.get("/?service=shop")

    assert not before.warnings
    (warning,) = warnings
    assert "abreast.weight.new_or_old=10000, abreast.weight.old=0; its share of users on new is 1;" in warning
    assert "overrides the sidecar" in page.text
