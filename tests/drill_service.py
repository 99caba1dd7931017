"""A version with faults: drill_service.py PORT VERSION FILE. It appends each order that it executes to FILE.

GET /be/MODE sets the mode: `well`, `failing` (500), `failing-items` (500 for one route), `slow` (30 s), `cutting` (half
an answer, then a closed connection), or `ill` (only the health check fails).
"""

from __future__ import annotations

import asyncio
import os
import sys

PORT, VERSION, FILE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
SLOW = 30.0  # seconds
BODY = VERSION.encode() * 100
orders = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
mode = ["well"]


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


def status(path: bytes) -> int:
    broken = mode[0] == "failing" or (mode[0] == "failing-items" and path.startswith(b"/items"))
    return 500 if broken else 200


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    method, path, _ = head[0].split(b" ")
    headers = dict(line.split(b": ", 1) for line in head[1:] if line)
    await reader.readexactly(int(headers.get(b"content-length", b"0")))
    if path.startswith(b"/be/"):
        mode[0] = path.removeprefix(b"/be/").decode()
    if path.startswith((b"/be/", b"/healthz")):
        ill = mode[0] == "ill" and path == b"/healthz"
        writer.write(answer(503 if ill else 200, b""))
        return
    if method == b"POST" and headers.get(b"x-abreast-role", b"live") == b"live":
        os.write(orders, headers[b"x-request-id"] + b"\n")
    if mode[0] == "slow":
        await asyncio.sleep(SLOW)
    response = answer(status(path), BODY)
    if mode[0] == "cutting":
        writer.write(response[: -len(BODY) // 2])
        raise EOFError
    writer.write(response)


async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            await exchange(reader, writer)
            await writer.drain()
    except (EOFError, ConnectionError):
        writer.close()


async def main() -> None:
    async with await asyncio.start_server(connection, "127.0.0.1", PORT) as server:
        await server.serve_forever()


asyncio.run(main())
