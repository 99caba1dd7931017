"""One request of a user's, sent to one version once more. It carries a mark, and no pair id, so that it is not captured."""

from __future__ import annotations

import asyncio

import httpx
from msgspec.structs import replace

from abreast.capture import Answer, Body, Capture
from abreast_sidecar.errors import SidecarError

MARK = ("x-abreast-again", "1")
TIMEOUT = 5.0  # seconds for a whole answer
LONGEST = 1024 * 1024  # bytes of an answer's body
ITS_OWN = frozenset({"content-length", "connection", "transfer-encoding", "expect", "upgrade", "te"})


class AskError(SidecarError):
    """A version did not answer as it should."""


class Asker:
    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False, trust_env=False)
        self._client.headers.clear()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def ask(self, before: Capture, base: str) -> Capture:
        """The same capture with the answer of now. Raise AskError."""
        request = before.request
        target = f"{base.rstrip('/')}{request.path}{'?' + request.query if request.query else ''}"
        headers = [
            (name, value)
            for name, value in request.headers
            if name not in ITS_OWN and not name.startswith("x-abreast-")
        ]
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self._client.stream(request.method, target, headers=[*headers, MARK]) as answer,
            ):
                held = await _body(answer)
                found = tuple(
                    (name.decode("latin-1").lower(), value.decode("latin-1"))
                    for name, value in answer.headers.raw
                )
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError, ValueError) as error:
            raise AskError(f"{base} can't be asked again: {type(error).__name__} {error}") from error
        return replace(before, answer=Answer(answer.status_code, found, Body(held, len(held))), complete=True)


async def _body(answer: httpx.Response) -> bytes:
    pieces, length = [], 0
    async for piece in answer.aiter_raw():
        length += len(piece)
        if length > LONGEST:
            raise ValueError(f"the answer is longer than {LONGEST} bytes")
        pieces.append(piece)
    return b"".join(pieces)
