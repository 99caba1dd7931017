"""One request of a user's, sent to one version once more. It carries a mark, and no pair id, so that it is not captured."""

from __future__ import annotations

import asyncio

import httpx
from msgspec.structs import replace

from abreast.capture import Answer, Body, Capture
from abreast_sidecar.errors import SidecarError

RECHECK_HEADER = ("x-abreast-again", "1")
REPLAY_TIMEOUT_S = 5.0  # seconds for a whole answer
MAX_REPLAY_BODY_BYTES = 1024 * 1024  # bytes of an answer's body
NOT_REPLAYED_HEADERS = frozenset(
    {"content-length", "connection", "transfer-encoding", "expect", "upgrade", "te"}
)


class ReplayError(SidecarError):
    """A version did not answer as it should."""


class Replayer:
    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=REPLAY_TIMEOUT_S, follow_redirects=False, trust_env=False)
        self._client.headers.clear()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def replay(self, capture: Capture, base_url: str) -> Capture:
        """The same capture with the answer of now. Raise AskError."""
        request = capture.request
        target = f"{base_url.rstrip('/')}{request.path}{'?' + request.query if request.query else ''}"
        headers = [
            (name, value)
            for name, value in request.headers
            if name not in NOT_REPLAYED_HEADERS and not name.startswith("x-abreast-")
        ]
        try:
            async with (
                asyncio.timeout(REPLAY_TIMEOUT_S),
                self._client.stream(request.method, target, headers=[*headers, RECHECK_HEADER]) as response,
            ):
                body = await _read_body(response)
                response_headers = tuple(
                    (name.decode("latin-1").lower(), value.decode("latin-1"))
                    for name, value in response.headers.raw
                )
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError, ValueError) as error:
            raise ReplayError(f"{base_url} can't be asked again: {type(error).__name__} {error}") from error
        return replace(
            capture,
            answer=Answer(response.status_code, response_headers, Body(body, len(body))),
            complete=True,
        )


async def _read_body(response: httpx.Response) -> bytes:
    chunks, length = [], 0
    async for chunk in response.aiter_raw():
        length += len(chunk)
        if length > MAX_REPLAY_BODY_BYTES:
            raise ValueError(f"the answer is longer than {MAX_REPLAY_BODY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
