"""One request as it passes: wraps `receive` and `send`, and only notes what it sees.

All that takes longer, such as decoding, hashing and finding the route, is done later, in assemble. What is here runs
in every sampled request, so it is written for speed.
"""

from __future__ import annotations

from asyncio import TimerHandle
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, Protocol

from abreast.body import MIN_BUFFER_BYTES, BodyBuffer, FileRange
from abreast.capture import Role, Version
from abreast.context import RequestContext
from abreast.rescue import ErrorReporter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]
# With the number of copies, what the answer is tagged with, and what makes the request as its code sees it.
RouteTags = tuple[Version, Role, int, RawHeaders, Callable[[str, int], RequestContext]]

PAIR_HEADER = b"x-abreast-pair"


class RecorderHost(Protocol):
    """What a recorder needs from the middleware."""

    body_limit: int
    report_error: ErrorReporter

    def enqueue(self, recorder: RequestRecorder) -> None: ...

    def schedule_truncation(self, recorder: RequestRecorder) -> TimerHandle: ...


class RequestRecorder:
    # Defaults in the class, since most requests need few of these and setting one takes time.
    headers: RawHeaders = []  # noqa: RUF012  # replaced, never changed
    trailers: RawHeaders | None = None  # a list once they are announced
    request_body: BodyBuffer | None = None
    response_body: BodyBuffer | None = None
    fast_path = True  # no body but `only`, and no fault
    single_chunk: bytes = b""  # the answer's body while it is one chunk
    status = 0
    response_ended = False  # the app has given the last message
    is_complete = False  # and the server has taken it
    client_left = False
    truncated_by_deadline = False  # its capture has left before it ended
    truncation_timer: TimerHandle | None = None  # once the answer comes in several chunks
    exception = ""
    error = ""  # why this capture can't be trusted, and is dropped
    first_byte_ns = 0
    finished_ns = 0
    app_returned = False  # the app has, and so have its background tasks
    queued_effect_bytes = 0  # bytes of effects that the backlog counts
    route = ""  # found in the background

    def __init__(
        self,
        host: RecorderHost,
        scope: Scope,
        receive: Receive,
        send: Send,
        pair: bytes,
        route_tags: RouteTags,
        context: RequestContext,
    ) -> None:
        self._host = host
        self._receive = receive
        self._send = send
        self.scope = scope
        self.pair = pair
        self.route_tags = route_tags
        self.context = context

    async def receive(self) -> Message:
        message = await self._receive()
        try:
            if message["type"] == "http.request":
                chunk = message.get("body")
                if chunk and not self.truncated_by_deadline:
                    if self.request_body is None:
                        self.request_body = BodyBuffer(self._host.body_limit)
                        self.fast_path = False
                    self.request_body.add(chunk)
            elif message["type"] == "http.disconnect" and not self.response_ended:
                self.client_left = True
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self._record_failure("receive", error)
        return message

    async def send(self, message: Message) -> None:  # noqa: C901  # calls would take time in every request
        try:
            kind = message["type"]
            if kind == "http.response.body":
                chunk = message.get("body")
                if chunk and not self.truncated_by_deadline:
                    if (
                        self.single_chunk
                        or self.response_body is not None
                        or chunk.__class__ is not bytes
                        or len(chunk) > MIN_BUFFER_BYTES
                    ):
                        self._ensure_response_body().add(chunk)
                    else:
                        self.single_chunk = chunk
                if not message.get("more_body") and self.trailers is None:
                    self.response_ended = self.context.response_sent = (
                        True  # before the server begins with the next request
                    )
                elif self.truncation_timer is None:
                    self.truncation_timer = self._host.schedule_truncation(self)
            elif kind == "http.response.start":
                self.first_byte_ns = perf_counter_ns()
                self.status = message["status"]
                headers = self.headers = list(message.get("headers", ()))
                if message.get("trailers"):
                    self.trailers = []
                message = {**message, "headers": [*headers, (PAIR_HEADER, self.pair), *self.route_tags[3]]}
            else:
                self._record_extension(kind, message)
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self._record_failure("send", error)
        try:
            await self._send(message)
        except OSError:  # how servers say that the client is gone
            self.client_left = True
            raise
        if self.response_ended and not self.finished_ns:
            self.is_complete = True
            self._enqueue()

    def mark_app_finished(self, exception: str) -> None:
        """The app is done, by returning or by raising. Of what it did after its answer, effects are ours alone."""
        self.app_returned = True
        self.context.response_sent = True
        if not self.finished_ns:
            self.exception = exception
            self._enqueue()

    def truncate_at_deadline(self) -> None:
        """Its time is over: what has come so far is all that is captured."""
        if not self.finished_ns:
            self.truncated_by_deadline = self.app_returned = True
            self._enqueue()

    def _ensure_response_body(self) -> BodyBuffer:
        """The answer's body, once it is more than one small chunk."""
        if self.response_body is None:
            self.response_body = BodyBuffer(self._host.body_limit)
            self.fast_path = False
            if self.single_chunk:
                self.response_body.add(self.single_chunk)
                self.single_chunk = b""
        return self.response_body

    def _record_extension(self, kind: str, message: Message) -> None:
        if kind == "http.response.trailers":
            self.trailers = [*(self.trailers or ()), *message.get("headers", ())]
            self.response_ended = not message.get("more_trailers", False)
        elif kind == "http.response.pathsend":
            self.response_ended = self.trailers is None
            self._record_file(FileRange.from_path(message["path"]))
        elif kind == "http.response.zerocopysend":
            self.response_ended = not message.get("more_body", False) and self.trailers is None
            offset, count = message.get("offset"), message.get("count")
            self._record_file(FileRange.from_descriptor(message["file"], offset, count))
        self.context.response_sent = self.response_ended

    def _record_file(self, part: FileRange) -> None:
        if (
            self.scope["method"] == "HEAD" or self.truncated_by_deadline
        ):  # the server sends none of it, or it comes too late
            part.close()
        else:
            self._ensure_response_body().add_file(part)

    def _enqueue(self) -> None:
        self.finished_ns = perf_counter_ns()
        if self.truncation_timer is not None:
            self.truncation_timer.cancel()
        try:
            self._host.enqueue(self)
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self.close()
            self._host.report_error("hand over", error)

    def _record_failure(self, operation: str, error: Exception) -> None:
        self.error = operation
        self.fast_path = False
        self._host.report_error(operation, error)

    @property
    def body_bytes(self) -> int:
        """Bytes of bodies."""
        size = len(self.single_chunk) if self.response_body is None else self.response_body.buffered_bytes
        return size if self.request_body is None else size + self.request_body.buffered_bytes

    @property
    def needs_thread(self) -> bool:
        return any(body is not None and body.needs_thread for body in (self.request_body, self.response_body))

    def finish(self) -> None:
        """What takes time with large bodies and files. Runs in the thread."""
        try:
            for body in (self.request_body, self.response_body):
                if body is not None:
                    body.finish()
        except Exception as error:  # noqa: BLE001  # this capture is dropped, and counted
            self._record_failure("reading a body", error)
        finally:
            self.close()

    def close(self) -> None:
        """Give back the descriptors of files."""
        for body in (self.request_body, self.response_body):
            if body is not None:
                body.close()
