"""Services that describe the request that they received: echo:asgi, echo:wsgi, and a tiny one as `echo.py PORT`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Headers that an answer shows: all that a proxy has no reason to change.
PREFIXES = (
    "x-t-",
    "host",
    "content-type",
    "content-encoding",
    "cookie",
    "accept",
    "authorization",
    "referer",
    "user-agent",
)
TINY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def describe(method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    shown = sorted((name, value) for name, value in headers if name.startswith(PREFIXES))
    digest = hashlib.sha256(body).hexdigest()
    return json.dumps(
        {"method": method, "target": target, "headers": shown, "bytes": len(body), "sha": digest}
    ).encode()


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    target = scope["raw_path"].decode("latin-1") + "?" + scope["query_string"].decode("latin-1")
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    answer = describe(scope["method"], target, headers, body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


def wsgi(environment: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    body = environment["wsgi.input"].read()
    headers = [
        (name.removeprefix("HTTP_").replace("_", "-").lower(), value)
        for name, value in environment.items()
        if name.startswith(("HTTP_", "CONTENT_"))
    ]
    answer = describe(environment["REQUEST_METHOD"], environment["RAW_URI"], headers, body)
    start_response("200 OK", [("Content-Length", str(len(answer)))])
    return [answer]


class Tiny(asyncio.Protocol):
    """Respond to each GET with two bytes. A request arrives in one piece."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(TINY * data.count(b"\r\n\r\n"))


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Tiny, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
