"""The line that `abreast finding` prints, given to a real shell and a real curl: the same request arrives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.pairs import build_curl_line
from abreast_sidecar.client.output import to_printable


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[str, asyncio.Future[bytes]]]:
    """Yield an address, and the bytes of the one request that arrives there."""
    request: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        request.set_result(head + body)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", request


async def send_curl(detail: api.PairDetail) -> tuple[str, list[str], bytes]:
    """Return request line, header lines and body, as a server gets them when the line is pasted."""
    async with listening() as (address, request):
        line, lacks = build_curl_line(detail)
        assert not lacks
        # a person copies the printed line
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", to_printable(line)),
            env={**os.environ, "URL": address, "LC_ALL": "C", "no_proxy": "*"},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0, errors.decode()
        head, _, body = (await asyncio.wait_for(request, 5)).partition(b"\r\n\r\n")
    first, *headers = head.decode("latin-1").split("\r\n")
    return first, headers, body


def detail(
    method: str = "GET", target: str = "/", body: bytes = b"", headers: tuple[tuple[str, str], ...] = ()
) -> api.PairDetail:
    pair_detail = api.PairDetail(
        request_body=body, request_headers=[common.Header(name=name, value=value) for name, value in headers]
    )
    pair_detail.pair.endpoint.method = method
    pair_detail.pair.request = target
    return pair_detail


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"])
async def test_curl_line_sends_method(method: str) -> None:
    assert (await send_curl(detail(method)))[0] == f"{method} / HTTP/1.1"


@pytest.mark.parametrize(
    "target",
    [
        "/products/7?currency=EUR&q=it's",
        "/$HOME/`id`/$(id)/!x",
        "/a%20b?q=%22%27%00&r=*",
        "/items/[1-3]/{a,b}?filter[price]=7",
        "/a/../b/./c//d",
        "/back\\slash;semi|pipe?a=1&b=2&amp;c",
        "/~user/caf%C3%A9",
        "/?q=%s%d",
        "//127.0.0.1:1/x",
        "/@127.0.0.1:1/x",
        "/\\\\127.0.0.1:1",
    ],
)
async def test_curl_line_sends_target(target: str) -> None:
    assert (await send_curl(detail(target=target)))[0] == f"GET {target} HTTP/1.1"


@pytest.mark.parametrize(
    "body",
    [
        b'{"name": "it\'s $HOME `id` \\" \\\\ !"}',
        '{"city": "Zürich ☃", "nbsp": "\u00a0\u200b"}'.encode(),
        b'{\n\t"a": 1,\r\n  "b": "x"\n}\n',
        b"@/etc/hostname",
        b"a=1&b=2",
        b"\xff\xfe'\\\x1b[31m\x01",
        b"-d",
        b"\n",
    ],
)
async def test_curl_line_sends_body(body: bytes) -> None:
    pair_detail = detail("PUT", "/x", body, (("content-type", "application/json"),))
    first, headers, content = await send_curl(pair_detail)

    assert (first, content) == ("PUT /x HTTP/1.1", body)
    assert "content-type: application/json" in headers


async def test_curl_line_sends_exactly_the_captured_headers() -> None:
    request_headers = (("accept", 'text/*; q="0.5", $HOME'), ("if-none-match", '"it\'s"'), ("x-empty", ""))
    _, headers, _ = await send_curl(detail("POST", "/", b"{}", request_headers))

    assert {'accept: text/*; q="0.5", $HOME', 'if-none-match: "it\'s"', "x-empty:"} <= {
        line.strip() for line in headers
    }
    assert not any(line.lower().startswith("content-type") for line in headers)


@pytest.mark.parametrize(
    ("pair_detail", "lack"),
    [
        (detail(headers=(("authorization", "hmac:00"),)), "its authorization (a secret; only its hash is stored)"),
        (detail(headers=(("x-name", "Zoë"),)), "its x-name (contains characters that the line can't hold; see --json)"),
        (detail("POST", body=b"\0"), "its body (1 bytes; see --json)"),
        (detail("POST", body=b"x" * 5000), "its body (5000 bytes; see --json)"),
        (
            detail(headers=(("@/etc/hostname", "x"),)),
            "its @/etc/hostname (contains characters that the line can't hold; see --json)",
        ),
        (detail(target="@127.0.0.1:24211/x"), "its target (no path; see --json)"),
        (detail(target="http://127.0.0.1/x"), "its target (no path; see --json)"),
        (detail("HEAD", body=b"{}"), "its body (2 bytes; see --json)"),
    ],
)
def test_curl_line_reports_omitted_parts(pair_detail: api.PairDetail, lack: str) -> None:
    assert build_curl_line(pair_detail)[1] == [lack]
