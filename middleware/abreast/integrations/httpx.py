"""httpx transports that record unsafe requests, and hold them back in shadow requests.

client = httpx.AsyncClient(transport=AsyncRecordingTransport())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Generic, TypeVar

import httpx

from abreast.context import downstream_headers
from abreast.effects import Effect, effect

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
STAND_IN_HEADER = "x-abreast-held-back"

TransportT = TypeVar("TransportT", httpx.BaseTransport, httpx.AsyncBaseTransport)
StandInFactory = Callable[[httpx.Request], httpx.Response]


def make_empty_response(_request: httpx.Request) -> httpx.Response:
    """Return status 200 with an empty JSON object."""
    return httpx.Response(200, json={}, headers={STAND_IN_HEADER: "1"})


class _RecordingTransport(Generic[TransportT]):
    _default_transport_class: ClassVar[Any]

    def __init__(
        self,
        transport: TransportT | None = None,
        *,
        stand_in: StandInFactory = make_empty_response,
        hold_safe: bool = False,
        envoy_hosts: Collection[str] = (),
    ) -> None:
        self._transport: TransportT = transport or self._default_transport_class()
        self._stand_in = stand_in
        self._hold_safe = hold_safe
        self._envoy_hosts = frozenset(envoy_hosts)

    def _mark(self, request: httpx.Request) -> httpx.Request:
        """Return the request of a shadow to Envoy with its mark. The original has none, so a redirect elsewhere has none."""
        host = request.url.netloc.decode()
        marks: dict[str, str] = downstream_headers() if host in self._envoy_hosts else {}
        if not marks:
            return request
        return httpx.Request(
            request.method,
            request.url,
            headers=[*request.headers.raw, *((name.encode(), value.encode()) for name, value in marks.items())],
            stream=request.stream,
            extensions=request.extensions,
        )

    def _make_effect(self, request: httpx.Request) -> Effect[httpx.Response] | None:
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


class AsyncRecordingTransport(_RecordingTransport[httpx.AsyncBaseTransport], httpx.AsyncBaseTransport):
    """A transport that records unsafe requests and holds them back in shadows.

    `transport` sends the requests. `stand_in` builds the response that a shadow receives. With `hold_safe`, GET, HEAD,
    OPTIONS and TRACE are recorded and held back too. Requests of shadows to `envoy_hosts`, such as `cart.internal:8080`, are
    marked, so that Envoy treats them as shadows.
    """

    _default_transport_class = httpx.AsyncHTTPTransport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        send, request_effect = self._transport.handle_async_request, self._make_effect(request)
        return await (send(self._mark(request)) if request_effect is None else request_effect.run(send, request))

    async def aclose(self) -> None:
        await self._transport.aclose()


class RecordingTransport(_RecordingTransport[httpx.BaseTransport], httpx.BaseTransport):
    """Synchronous `AsyncRecordingTransport`, for `httpx.Client`."""

    _default_transport_class = httpx.HTTPTransport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        send, request_effect = self._transport.handle_request, self._make_effect(request)
        return send(self._mark(request)) if request_effect is None else request_effect.call(send, request)

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
