"""One request as it passes: wraps `receive` and `send`, and only notes what it sees.

All that takes longer, such as decoding, hashing and finding the route, is done later, in assemble. What is here runs
in every sampled request, so it is written for speed.
"""

from __future__ import annotations

from asyncio import TimerHandle
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, Protocol

from abreast.body import HOLD, BodyRecorder, FilePart
from abreast.capture import Role, Version
from abreast.context import Current
from abreast.rescue import Rescue

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]
# With the number of copies, what the answer is tagged with, and what makes the request as its code sees it.
Marks = tuple[Version, Role, int, RawHeaders, Callable[[str, int], Current]]

PAIR = b"x-abreast-pair"


class Host(Protocol):
    """What a recorder needs from the middleware."""

    body_limit: int
    rescue: Rescue

    def recorded(self, recorder: Recorder) -> None: ...

    def goes_on(self, recorder: Recorder) -> TimerHandle: ...


class Recorder:
    # Defaults in the class, since most requests need few of these and setting one takes time.
    headers: RawHeaders = []  # noqa: RUF012  # replaced, never changed
    trailers: RawHeaders | None = None  # a list once they are announced
    asked: BodyRecorder | None = None
    answer: BodyRecorder | None = None
    plain = True  # no body but `only`, and no fault
    only: bytes = b""  # the answer's body while it is one chunk
    status = 0
    ended = False  # the app has given the last message
    complete = False  # and the server has taken it
    client_left = False
    going_on = False  # its capture has left before it ended
    timer: TimerHandle | None = None  # once the answer comes in several chunks
    raised = ""
    fault = ""  # why this capture can't be trusted, and is dropped
    first_byte = 0
    finished = 0
    returned = False  # the app has, and so have its background tasks
    journaled = 0  # bytes of effects that the backlog counts
    route = ""  # found in the background

    def __init__(
        self,
        host: Host,
        scope: Scope,
        receive: Receive,
        send: Send,
        pair: bytes,
        marks: Marks,
        now: Current,
    ) -> None:
        self._host = host
        self._receive = receive
        self._send = send
        self.scope = scope
        self.pair = pair
        self.marks = marks
        self.now = now

    async def receive(self) -> Message:
        message = await self._receive()
        try:
            if message["type"] == "http.request":
                chunk = message.get("body")
                if chunk and not self.going_on:
                    if self.asked is None:
                        self.asked = BodyRecorder(self._host.body_limit)
                        self.plain = False
                    self.asked.add(chunk)
            elif message["type"] == "http.disconnect" and not self.ended:
                self.client_left = True
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self._failed("receive", error)
        return message

    async def send(self, message: Message) -> None:  # noqa: C901  # calls would take time in every request
        try:
            kind = message["type"]
            if kind == "http.response.body":
                chunk = message.get("body")
                if chunk and not self.going_on:
                    if (
                        self.only
                        or self.answer is not None
                        or chunk.__class__ is not bytes
                        or len(chunk) > HOLD
                    ):
                        self._body().add(chunk)
                    else:
                        self.only = chunk
                if not message.get("more_body") and self.trailers is None:
                    self.ended = self.now.answered = True  # before the server begins with the next request
                elif self.timer is None:
                    self.timer = self._host.goes_on(self)
            elif kind == "http.response.start":
                self.first_byte = perf_counter_ns()
                self.status = message["status"]
                headers = self.headers = list(message.get("headers", ()))
                if message.get("trailers"):
                    self.trailers = []
                message = {**message, "headers": [*headers, (PAIR, self.pair), *self.marks[3]]}
            else:
                self._other(kind, message)
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self._failed("send", error)
        try:
            await self._send(message)
        except OSError:  # how servers say that the client is gone
            self.client_left = True
            raise
        if self.ended and not self.finished:
            self.complete = True
            self._ship()

    def left(self, raised: str) -> None:
        """The app is done, by returning or by raising. Of what it did after its answer, effects are ours alone."""
        self.returned = True
        self.now.answered = True
        if not self.finished:
            self.raised = raised
            self._ship()

    def leave(self) -> None:
        """Its time is over: what has come so far is all that is captured."""
        if not self.finished:
            self.going_on = self.returned = True
            self._ship()

    def _body(self) -> BodyRecorder:
        """The answer's body, once it is more than one small chunk."""
        if self.answer is None:
            self.answer = BodyRecorder(self._host.body_limit)
            self.plain = False
            if self.only:
                self.answer.add(self.only)
                self.only = b""
        return self.answer

    def _other(self, kind: str, message: Message) -> None:
        if kind == "http.response.trailers":
            self.trailers = [*(self.trailers or ()), *message.get("headers", ())]
            self.ended = not message.get("more_trailers", False)
        elif kind == "http.response.pathsend":
            self.ended = self.trailers is None
            self._file(FilePart.of_path(message["path"]))
        elif kind == "http.response.zerocopysend":
            self.ended = not message.get("more_body", False) and self.trailers is None
            offset, count = message.get("offset"), message.get("count")
            self._file(FilePart.of_descriptor(message["file"], offset, count))
        self.now.answered = self.ended

    def _file(self, part: FilePart) -> None:
        if (
            self.scope["method"] == "HEAD" or self.going_on
        ):  # the server sends none of it, or it comes too late
            part.close()
        else:
            self._body().add_file(part)

    def _ship(self) -> None:
        self.finished = perf_counter_ns()
        if self.timer is not None:
            self.timer.cancel()
        try:
            self._host.recorded(self)
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self.close()
            self._host.rescue("hand over", error)

    def _failed(self, where: str, error: Exception) -> None:
        self.fault = where
        self.plain = False
        self._host.rescue(where, error)

    @property
    def held(self) -> int:
        """Bytes of bodies."""
        held = len(self.only) if self.answer is None else self.answer.held
        return held if self.asked is None else held + self.asked.held

    @property
    def needs_thread(self) -> bool:
        return any(body is not None and body.needs_thread for body in (self.asked, self.answer))

    def finish(self) -> None:
        """What takes time with large bodies and files. Runs in the thread."""
        try:
            for body in (self.asked, self.answer):
                if body is not None:
                    body.finish()
        except Exception as error:  # noqa: BLE001  # this capture is dropped, and counted
            self._failed("reading a body", error)
        finally:
            self.close()

    def close(self) -> None:
        """Give back the descriptors of files."""
        for body in (self.asked, self.answer):
            if body is not None:
                body.close()
