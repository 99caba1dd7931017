"""A service in two versions that knows nothing of Abreast: plain_service.py VERSION PORT [nagle]. It has no framework.

With `nagle`, the body of a response can wait 40 ms until Envoy's machine confirms its head.

The new version returns prices as text, and drops the header x-stock.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION, PORT, *OPTIONS = sys.argv[1:]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"plain-{VERSION}"
    disable_nagle_algorithm = not OPTIONS

    def do_GET(self) -> None:
        if self.path.startswith("/products/"):
            price = int(self.path.rpartition("/")[2]) + 0.5
            self.respond({"name": "Tea", "price": str(price) if VERSION == "new" else price})
        elif self.path.startswith("/shops/"):
            self.respond({"name": self.path.rpartition("/")[2], "open": "yes" if VERSION == "new" else True})
        elif self.path == "/large":
            self.respond({"data": "x" * 400_000})
        elif self.path == "/stream":
            self.stream()
        elif self.path == "/slow":
            time.sleep(0.03)
            self.respond({"ok": True})
        elif self.path in {"/empty", "/unchanged"}:
            self.send_response(204 if self.path == "/empty" else 304)
            self.end_headers()
        elif self.path == "/reset" and VERSION == "new":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.respond({"ok": True})

    do_HEAD = do_GET  # noqa: N815  # the name that the base class calls

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.respond({"length": len(body)})

    def respond(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/plain")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(5):
            line = f"line {number}\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            time.sleep(0.1)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, _format: str, *_arguments: object) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", int(PORT)), Handler).serve_forever()
