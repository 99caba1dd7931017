"""`abreast doctor` names services whose responses wait behind a connection, or that answer copies differently."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from abreast_sidecar.cli.doctor.envoy import find_connection_wait
from support import eventually, find_free_port
from support_up import Up

WORK_S = 0.5  # after a response
REQUESTS = 12


class Handler(BaseHTTPRequestHandler):
    """Allows one request of a client for each path that starts with /limited or /once."""

    protocol_version = "HTTP/1.1"
    work_s = 0.0
    seen: ClassVar[Counter[tuple[str, str]]] = Counter()  # shared by both versions, as a store would be

    def do_GET(self) -> None:
        status = 200
        for prefix, refusal in (("/limited", 429), ("/once", 403)):
            if self.path.startswith(prefix):
                client = self.path, self.headers.get("x-forwarded-for", "")
                self.seen[client] += 1
                status = 200 if self.seen[client] == 1 else refusal
        self.send_response(status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
        self.wfile.flush()
        time.sleep(self.work_s)

    def log_message(self, _format: str, *_arguments: object) -> None:
        pass


class BusyHandler(Handler):
    work_s = WORK_S


class ClosingHandler(Handler):
    protocol_version = "HTTP/1.0"


@contextlib.contextmanager
def serve(kind: type[HTTPServer], handler: type[Handler], port: int = 0) -> Iterator[int]:
    server: Any = kind(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("kind", "handler", "expected"),
    [
        (ThreadingHTTPServer, Handler, ""),
        (HTTPServer, ClosingHandler, ""),
        (HTTPServer, Handler, "serves one connection at a time"),
        (ThreadingHTTPServer, BusyHandler, "works on after a response"),
    ],
)
def test_connection_wait_is_found(kind: type[HTTPServer], handler: type[Handler], expected: str) -> None:
    with serve(kind, handler) as port:
        wait = find_connection_wait("127.0.0.1", port)

    assert wait.startswith(expected)
    assert bool(wait) == bool(expected)


def test_endpoint_that_does_not_answer_has_no_connection_wait() -> None:
    assert not find_connection_wait("127.0.0.1", find_free_port())


def test_doctor_names_waits_and_copies_with_other_statuses() -> None:
    old, new = find_free_port(), find_free_port()
    with (
        serve(ThreadingHTTPServer, Handler, old),
        serve(ThreadingHTTPServer, BusyHandler, new),
        Up(old, new, ("--baseline", "100%")) as up,
    ):
        up.healthy()
        for number in range(REQUESTS):
            up.ask(f"/limited/{number}")
            up.ask(f"/once/{number}")
        up.wait_for_pairs(2 * REQUESTS)

        def list_warnings() -> dict[str, str]:
            return {
                (check["found"].split(" got ")[-1][:3] if check["name"] == "copies" else check["name"]): check["found"]
                for check in up.json("doctor")["checks"]
                if check["state"] == "warn" and (check["name"] == "connections" or check["part"] == "Postgres")
            }

        eventually(lambda: {"connections", "403", "429"} <= set(list_warnings()), description="doctor warns of all")
        warnings = list_warnings()

    assert warnings["connections"].startswith(f"127.0.0.1:{new} works on after a response")
    assert f"127.0.0.1:{old}" not in warnings["connections"]
    assert "the cause may be a rate limit by client" in warnings["429"]
    assert "shop answers copies differently" in warnings["403"]
    assert "the cause may be a session or cookie for one use" in warnings["403"]
