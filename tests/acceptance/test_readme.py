"""The README's examples run as printed, except for the addresses."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import redis

from abreast.protocol.join import JOIN_SCRIPT, SERVICES_KEY, Keys, Limits, join_arguments
from abreast.v1 import comparison_pb2, comparison_pb2_grpc
from abreast_sidecar.stack.servers import RedisServer
from support import eventually, free_ports
from support_captures import capture, encode

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def snippet(name: str) -> str:
    """Return the fenced block after `<!-- run: NAME -->`."""
    match = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert match, f"the README has no snippet {name}"
    return match[1]


def commands(name: str) -> list[str]:
    return [line[2:] for line in snippet(name).splitlines() if line.startswith("$ ")]


@pytest.fixture
def sidecar(postgres_url: str) -> Iterator[str]:
    """Yield the address of a sidecar that has compared one pair."""
    ports = free_ports(2)
    with RedisServer() as server:
        environment = {
            **os.environ,
            "ABREAST_REDIS_URL": server.url,
            "ABREAST_POSTGRES_URL": postgres_url,
            "ABREAST_GRPC_LISTEN": f"127.0.0.1:{ports[0]}",
            "ABREAST_HTTP_LISTEN": f"127.0.0.1:{ports[1]}",
            "ABREAST_COLLECTOR_LISTEN": "127.0.0.1:0",
        }
        process = subprocess.Popen([BIN / "abreast", "sidecar"], env=environment, stdout=subprocess.DEVNULL)
        try:
            send_a_pair(server.url)
            address = f"127.0.0.1:{ports[0]}"
            eventually(lambda: findings(address) == 1, description="the finding")
            yield address
        finally:
            process.terminate()
            process.wait(20)


def send_a_pair(url: str) -> None:
    captures = [capture("old", {"price": 1}), capture("new", {"price": 2}, role="shadow")]
    batch = [(item.pair, item.slot, item.expected_captures, encode(item)) for item in captures]
    names, arguments = join_arguments(Keys("shop", 0), Limits(), batch)
    with redis.Redis.from_url(url) as client:
        client.hset(SERVICES_KEY, "shop", "1")
        client.eval(JOIN_SCRIPT, len(names), *names, *arguments)


def findings(address: str) -> int:
    return asyncio.run(_findings(address))


async def _findings(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = comparison_pb2_grpc.ComparisonServiceStub(channel)
        try:
            answer = await stub.ListFindings(comparison_pb2.ListFindingsRequest(service="shop"), timeout=5)
        except grpc.RpcError:
            return 0
        return len(answer.findings)


def test_readme_middleware_example_runs() -> None:
    program = snippet("middleware") + (
        "\nfrom starlette.testclient import TestClient\n"
        "@app.get('/')\ndef home(): return {'ok': True}\n"
        "with TestClient(app) as client: print(client.get('/').json())\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (process.returncode, process.stdout) == (0, "{'ok': True}\n"), process.stderr


def test_readme_envoy_command_renders(tmp_path: Path) -> None:
    words = shlex.split(commands("envoy")[0])
    process = subprocess.run([BIN / words[0], *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stderr
    assert "10.0.0.12" in (tmp_path / "envoy.yaml").read_text()


def test_readme_client_runs(sidecar: str) -> None:
    program = snippet("client").replace("127.0.0.1:50051", sidecar)
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("1 GET /products/{id} $.price ")


def test_readme_grpcurl_command_runs(sidecar: str) -> None:
    """By `buf curl`, which is on the package index; it takes the same words in another order."""
    words = shlex.split(commands("grpcurl")[0])
    assert words[:3] == ["grpcurl", "-plaintext", "-d"]
    _, method = words[4:]
    command: list[str | Path] = [
        BIN / "buf",
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--data",
        words[3],
    ]
    process = subprocess.run([*command, f"http://{sidecar}/{method}"], capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stderr
    assert '"pairs":"1"' in process.stdout.replace(" ", "")
