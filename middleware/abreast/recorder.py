"""One request as it passes: wraps `receive` and `send`, and only notes what it sees.

All that takes longer, such as decoding, hashing and finding the route, is done later, in assemble. What is here runs
in every sampled request, so it is written for speed.
"""

from __future__ import annotations

import hashlib
import os
from asyncio import TimerHandle
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Protocol

from abreast._thread import BACKGROUND_THREAD, MAX_OPEN_FILES
from abreast.context import RequestContext
from abreast.errors import ErrorReporter
from abreast.protocol.capture import DIGEST_BYTES, Body, Role, Version, digest

MIN_BUFFER_BYTES = 64 * 1024  # bytes that are always held until the background hashes them, whatever the limit
HASH_BATCH_BYTES = (
    32 * 1024
)  # bytes that are handed to the thread at once, since waking it costs more than hashing them
FILE_BLOCK_BYTES = 256 * 1024  # bytes read from a file at once


@dataclass(frozen=True, slots=True)
class FileRange:
    """A descriptor of our own, so that the app may close or remove its file at once."""

    descriptor: int
    offset: int
    count: int | None  # bytes; None means up to the end

    @classmethod
    def from_path(cls, path: str) -> FileRange:
        """Raise OSError when the file can't be opened, or when too many are open already."""
        return cls(_claim_descriptor(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)), 0, None)

    @classmethod
    def from_descriptor(cls, file: int, offset: int | None, count: int | None) -> FileRange:
        """Raise OSError for what can't be read without moving its offset, such as a pipe."""
        position = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        return cls(_claim_descriptor(os.dup(file)), position, count)

    def read(self) -> Iterator[bytes]:
        position, remaining = self.offset, self.count
        while remaining is None or remaining > 0:
            block = os.pread(
                self.descriptor, FILE_BLOCK_BYTES if remaining is None else min(FILE_BLOCK_BYTES, remaining), position
            )
            if not block:
                return
            position += len(block)
            remaining = None if remaining is None else remaining - len(block)
            yield block

    def close(self) -> None:
        os.close(self.descriptor)
        BACKGROUND_THREAD.release_file()


def _claim_descriptor(descriptor: int) -> int:
    if not BACKGROUND_THREAD.reserve_file():
        os.close(descriptor)
        raise OSError(f"{MAX_OPEN_FILES} files are open for recording already")
    return descriptor


class BodyBuffer:
    """Holds chunks up to a bound; of a longer body the first `limit` bytes, and a digest that the thread makes."""

    __slots__ = (
        "_capacity",
        "_digest",
        "_unhashed_bytes",
        "_unhashed_chunks",
        "buffered_bytes",
        "chunks",
        "length",
        "limit",
        "parts",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0
        self.buffered_bytes = 0
        self.chunks: list[bytes] = []
        self.parts: list[bytes | FileRange] | None = None  # instead of chunks, once a file is part of the body
        self._capacity = max(MIN_BUFFER_BYTES, limit)
        self._digest: hashlib.blake2b | None = None
        self._unhashed_chunks: list[bytes] = []  # chunks that the thread has not got yet
        self._unhashed_bytes = 0

    def add(self, chunk: bytes) -> None:
        """Raise TypeError for what is not bytes, and OverflowError for what the thread can't keep up with."""
        if chunk.__class__ is not bytes:
            chunk = _copy(chunk)
        self.length += len(chunk)
        if self.length <= self._capacity:
            self.buffered_bytes = self.length
            (self.chunks if self.parts is None else self.parts).append(chunk)
        elif self.parts is None:
            self._hash_chunk(chunk)
        else:
            raise OverflowError("a file and many bytes in one body are not recorded")

    def add_file(self, part: FileRange) -> None:
        if self._digest is not None:
            part.close()
            raise OverflowError("many bytes and a file in one body are not recorded")
        if self.parts is None:
            self.parts = list(self.chunks)
        self.parts.append(part)

    def _hash_chunk(self, chunk: bytes) -> None:
        if self._digest is None:
            self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            self._unhashed_chunks = list(self.chunks)
        self._unhashed_chunks.append(chunk)
        self._unhashed_bytes += len(chunk)
        if self._unhashed_bytes > HASH_BATCH_BYTES:
            self._submit_hashing()
        remaining = self.limit - self.buffered_bytes
        if remaining > 0:
            self.chunks.append(chunk[:remaining])
            self.buffered_bytes += min(remaining, len(chunk))

    def _submit_hashing(self) -> None:
        if not BACKGROUND_THREAD.has_room:
            raise OverflowError("a body came faster than it could be hashed")
        assert self._digest is not None
        update, chunks = self._digest.update, self._unhashed_chunks
        BACKGROUND_THREAD.submit(lambda: _update_digest(update, chunks), self._unhashed_bytes)
        self._unhashed_chunks, self._unhashed_bytes = [], 0

    @property
    def needs_thread(self) -> bool:
        return self._digest is not None or self.parts is not None

    def finish(self) -> None:
        """Runs in the thread, after all that it was handed. Raise OSError when a file can't be read."""
        if self._digest is not None:
            _update_digest(self._digest.update, self._unhashed_chunks)
            self._unhashed_chunks = []
        if self.parts is not None:
            self._read_parts(self.parts)

    def _read_parts(self, parts: list[bytes | FileRange]) -> None:
        content, self.length = bytearray(), 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in parts:
            for block in (part,) if isinstance(part, bytes) else part.read():
                self.length += len(block)
                self._digest.update(block)
                content += block[: max(0, self.limit - len(content))]
        self.chunks = [bytes(content)]
        self.buffered_bytes = len(content)

    def close(self) -> None:
        for part in self.parts or ():
            if isinstance(part, FileRange):
                part.close()
        self.parts = None

    def to_body(self) -> Body:
        """What was recorded. Call it in the background: it may hash up to 64 KiB."""
        content = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        if self._digest is None or self.length <= self.limit:
            return small_body(content, self.limit)
        return Body(content[: self.limit], self.length, self._digest.hexdigest())


def small_body(content: bytes, limit: int) -> Body:
    if len(content) <= limit:
        return Body(content, len(content))
    return Body(content[:limit], len(content), digest(content))


def _copy(chunk: object) -> bytes:
    """A buffer that the app may use again."""
    if isinstance(chunk, bytes | bytearray | memoryview):
        return bytes(chunk)
    raise TypeError(f"a chunk of a body must be bytes, got {type(chunk).__name__}")


def _update_digest(update: Callable[[bytes], None], chunks: list[bytes]) -> None:
    for chunk in chunks:
        update(chunk)


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
