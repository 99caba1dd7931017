"""httpx transports that record unsafe requests, and hold them back in shadow requests.

client = httpx.AsyncClient(transport=AsyncRecordingTransport())
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from abreast.effects import Effect, effect

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
STAND_IN_HEADER = "x-abreast-held-back"

StandInFactory = Callable[[httpx.Request], httpx.Response]


def make_empty_response(_request: httpx.Request) -> httpx.Response:
    """Return status 200 with an empty JSON object."""
    return httpx.Response(200, json={}, headers={STAND_IN_HEADER: "1"})


class _EffectFactory:
    def __init__(self, stand_in: StandInFactory, *, hold_safe: bool) -> None:
        self._stand_in = stand_in
        self._hold_safe = hold_safe

    def make_effect(self, request: httpx.Request) -> Effect[httpx.Response] | None:
        """Return None if the request is not recorded."""
        if request.method in SAFE_METHODS and not self._hold_safe:
            return None
        kind = f"http.{request.method.lower()}"
        return effect(kind, describe, key=request.url.host, stand_in=self._make_stand_in)

    def _make_stand_in(self, request: httpx.Request) -> httpx.Response:
        """Return the stand-in as an unread response, because the client reads and times each response."""
        response = self._stand_in(request)
        if not response.is_stream_consumed and not response.is_closed:
            return response
        response.headers.pop("content-encoding", None)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=httpx.ByteStream(response.content),
            extensions=response.extensions,
        )


class AsyncRecordingTransport(httpx.AsyncBaseTransport):
    """A transport that records unsafe requests and holds them back in shadows.

    `transport` sends the requests. `stand_in` builds the response that a shadow receives. With `hold_safe`, GET, HEAD,
    OPTIONS and TRACE are recorded and held back too.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        stand_in: StandInFactory = make_empty_response,
        hold_safe: bool = False,
    ) -> None:
        self._transport = transport or httpx.AsyncHTTPTransport()
        self._effect_factory = _EffectFactory(stand_in, hold_safe=hold_safe)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request_effect = self._effect_factory.make_effect(request)
        if request_effect is None:
            return await self._transport.handle_async_request(request)
        return await request_effect.run(self._transport.handle_async_request, request)

    async def aclose(self) -> None:
        await self._transport.aclose()


class RecordingTransport(httpx.BaseTransport):
    """Synchronous `AsyncRecordingTransport`, for `httpx.Client`."""

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        stand_in: StandInFactory = make_empty_response,
        hold_safe: bool = False,
    ) -> None:
        self._transport = transport or httpx.HTTPTransport()
        self._effect_factory = _EffectFactory(stand_in, hold_safe=hold_safe)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request_effect = self._effect_factory.make_effect(request)
        if request_effect is None:
            return self._transport.handle_request(request)
        return request_effect.call(self._transport.handle_request, request)

    def close(self) -> None:
        self._transport.close()


def describe(request: httpx.Request) -> dict[str, Any]:
    """Return the payload of a request.

    The only header in it is the content type. Other headers often differ on every request or contain secrets.
    """
    url = request.url
    description: dict[str, Any] = {"url": f"{url.scheme}://{url.netloc.decode('ascii')}{url.path}"}
    if url.query:
        description["query"] = {name: url.params.get_list(name) for name in url.params}
    if content_type := request.headers.get("content-type", "").partition(";")[0]:
        description["content_type"] = content_type
    try:
        content = request.content
    except httpx.RequestNotRead:  # reading a stream here would consume it
        return {**description, "body": "<streamed>"}
    if content:
        description["body"] = _decode_body(content, content_type)
    return description


def _decode_body(content: bytes, content_type: str) -> Any:
    if content_type == "application/x-www-form-urlencoded":
        fields = httpx.QueryParams(content.decode("utf-8", "backslashreplace"))
        return {name: fields.get_list(name) for name in fields}
    try:
        return json.loads(content)  # the standard library keeps large integers exact
    except (ValueError, RecursionError):
        return content.decode("utf-8", "backslashreplace")
