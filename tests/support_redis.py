"""Redis in its larger forms: a cluster, and servers that Sentinels watch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from abreast_sidecar.stack.process import ServerProcess
from abreast_sidecar.stack.servers import RedisServer
from support import eventually, free_ports
from support_certificate import Certificate

SLOTS = 16384


@contextmanager
def server(*options: str, port: int = 0, folder: Path | None = None) -> Iterator[RedisServer]:
    """One that a test may stop, fill or freeze."""
    binary = os.environ.get("ABREAST_TEST_REDIS")
    with RedisServer(folder, binary=Path(binary) if binary else None, options=options, port=port) as started:
        yield started


def admin(started: RedisServer) -> Any:
    return redis.Redis.from_url(started.url, decode_responses=True)


@dataclass(frozen=True)
class ClusterServers:
    nodes: tuple[RedisServer, ...]

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"


@contextmanager
def cluster(size: int = 3) -> Iterator[ClusterServers]:
    """Primaries only, with the slots shared out. Their own connections need a second port each."""
    ports = free_ports(2 * size)
    with ExitStack() as stack:
        nodes = tuple(
            stack.enter_context(server("--cluster-enabled", "yes", "--cluster-port", str(second), port=first))
            for first, second in zip(ports[::2], ports[1::2], strict=True)
        )
        for place, node in enumerate(nodes):
            with admin(node) as client:
                first, last = SLOTS * place // size, SLOTS * (place + 1) // size - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for node in nodes:
            with admin(node) as client:
                for other, second in zip(nodes, ports[1::2], strict=True):
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, second)
        for node in nodes:
            eventually(lambda node=node: _agreed(node, size), description="the cluster is one")  # type: ignore[misc]  # bound
        yield ClusterServers(nodes)


def _agreed(node: RedisServer, size: int) -> bool:
    with admin(node) as client:
        info = client.execute_command("CLUSTER", "INFO")
        text = info if isinstance(info, dict) else dict(line.split(":") for line in info.split())
        return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == size


@dataclass(frozen=True)
class Watched:
    """A primary, its replica, and the Sentinel that watches them."""

    primary: RedisServer
    replica: RedisServer
    sentinel: RedisServer

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/abreast/0"


@contextmanager
def watched() -> Iterator[Watched]:
    with ExitStack() as stack:
        primary = stack.enter_context(server("--repl-diskless-sync-delay", "0"))
        replica = stack.enter_context(
            server("--replicaof", "127.0.0.1", str(primary.port), "--repl-diskless-sync-delay", "0")
        )
        sentinel = stack.enter_context(_sentinel(primary.port))
        servers = Watched(primary, replica, sentinel)
        eventually(lambda: _known(servers), description="the sentinel knows the replica")
        yield servers


@contextmanager
def _sentinel(primary: int) -> Iterator[RedisServer]:
    started = Sentinel()
    started.primary = primary
    with started:
        yield started


class Sentinel(RedisServer):
    """The same binary; it wants a file that it may write."""

    primary = 0

    def start(self) -> Sentinel:
        folder = self._prepare_folder()
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor abreast 127.0.0.1 {self.primary} 1\n"
            "sentinel down-after-milliseconds abreast 400\nsentinel failover-timeout abreast 3000\n"
        )
        binary = os.environ.get("ABREAST_TEST_REDIS") or self.binary
        self.process = ServerProcess.start(
            "sentinel", [binary, config, "--sentinel"], folder / "sentinel.log", is_ready=self._is_ready
        )
        return self


def _known(servers: Watched) -> bool:
    with admin(servers.sentinel) as client, admin(servers.replica) as replica:
        replicas = client.execute_command("SENTINEL", "SLAVES", "abreast")
        linked = replica.info("replication")["master_link_status"] == "up"
        return (
            linked
            and len(replicas) == 1
            and not {"disconnected", "s_down"} & set(str(replicas[0]).replace("'", ",").split(","))
        )


@asynccontextmanager
async def behind_tls(started: RedisServer, certificate: Certificate) -> AsyncIterator[int]:
    """Yield a port that speaks TLS, because the embedded server is built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while content := await reader.read(65536):
                writer.write(content)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, back = await asyncio.open_connection("127.0.0.1", started.port)
        await asyncio.gather(pass_on(reader, back), pass_on(behind, writer))

    front = await asyncio.start_server(serve, "localhost", ssl=context)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        front.close()
