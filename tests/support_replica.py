"""A sidecar in a separate process that a test can kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from abreast_sidecar.stack.servers import SidecarServer
from support import free_ports
from support_clock import Clock


@dataclass
class Replica:
    server: SidecarServer
    port: int  # gRPC

    @property
    def pid(self) -> int:
        assert self.server.process is not None
        return self.server.process.popen.pid

    def acting(self) -> bool:
        host, port = self.server.http_address
        with urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            return "abreast_leader 1.0" in answer.read().decode()


@contextmanager
def replica(redis_url: str, postgres_url: str, folder: Path, *, clock: Clock | None = None) -> Iterator[Replica]:
    grpc_port, http_port = free_ports(2)
    settings = {
        "ABREAST_REDIS_URL": redis_url,
        "ABREAST_POSTGRES_URL": postgres_url,
        "ABREAST_GRPC_LISTEN": f"127.0.0.1:{grpc_port}",
        "ABREAST_HTTP_LISTEN": f"127.0.0.1:{http_port}",
        "ABREAST_COLLECTOR_LISTEN": "127.0.0.1:0",
    }
    folder.mkdir()
    server = SidecarServer(settings, ("127.0.0.1", http_port), folder=folder)
    server.settings |= clock.environment if clock else {}
    try:
        server.start()
        yield Replica(server, grpc_port)
    finally:
        server.stop()
