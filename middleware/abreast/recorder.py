"""The recorder of one request. For ASGI, it wraps `receive` and `send`, and keeps references.

This code runs in every sampled request, so it is written for speed. The export does the slow work later: decoding,
hashing and the search for the route. A thread reads files and hashes large bodies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from asyncio import TimerHandle
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter_ns
from typing import Any, Protocol

from abreast.context import RequestContext
from abreast.errors import ErrorReporter
from abreast.protocol.capture import DIGEST_BYTES, Body, Role, Version, digest

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]
# Version, role, number of captures of the pair, headers for the response, and the factory of contexts.
RouteTags = tuple[Version, Role, int, RawHeaders, Callable[[str, int], RequestContext]]

PAIR_HEADER = b"x-abreast-pair"
MIN_BUFFER_BYTES = 64 * 1024  # buffered in any case, and hashed by the export
HASH_BATCH_BYTES = 32 * 1024  # per job of the thread; to wake the thread for less costs more than the hashing
FILE_BLOCK_BYTES = 256 * 1024  # per read
MAX_WAITING_BYTES = 16 * 1024 * 1024  # bytes that may wait for the thread
MAX_OPEN_FILES = 64


class BackgroundThread:
    """A daemon thread for work that would block the event loop: it runs jobs in the order of submission."""

    NAME = "abreast"

    def __init__(self) -> None:
        self.waiting_bytes = 0
        self.file_slots = threading.Semaphore(MAX_OPEN_FILES)
        self._pid = 0
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[tuple[Callable[[], None], int]] = SimpleQueue()

    @property
    def has_room(self) -> bool:
        return self.waiting_bytes < MAX_WAITING_BYTES

    def submit(self, job: Callable[[], None], size: int = 0) -> None:
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            self.waiting_bytes += size
        self._jobs.put((job, size))

    def drain(self, timeout_s: float) -> None:
        """Return when the jobs that were submitted so far have run, or after the timeout."""
        if self._pid == os.getpid():
            done = threading.Event()
            self.submit(done.set)
            done.wait(timeout_s)

    def _start(self) -> None:
        """Start a thread in this process. Threads don't survive a fork, and the parent's locks may be held for ever."""
        self._lock = threading.Lock()
        self._jobs = SimpleQueue()
        self.waiting_bytes = 0
        self.file_slots = threading.Semaphore(MAX_OPEN_FILES)
        self._pid = os.getpid()
        threading.Thread(target=self._run, args=(self._jobs,), name=self.NAME, daemon=True).start()

    def _run(self, jobs: SimpleQueue[tuple[Callable[[], None], int]]) -> None:
        while True:
            job, size = jobs.get()
            with contextlib.suppress(Exception):  # jobs report their errors
                job()
            with self._lock:
                self.waiting_bytes -= size


BACKGROUND_THREAD = BackgroundThread()


@dataclass(frozen=True, slots=True)
class FileRange:
    """A part of a file, with its own descriptor: the app may close or remove the file at once."""

    descriptor: int
    offset: int
    count: int  # bytes at most

    @classmethod
    def from_path(cls, path: str) -> FileRange:
        """Open a whole file. Raises OSError if it can't be opened, or if too many files are open."""
        return cls(_claim_descriptor(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)), 0, sys.maxsize)

    @classmethod
    def from_descriptor(cls, file: int, offset: int | None, count: int | None) -> FileRange:
        """Duplicate a descriptor. Raises OSError for a pipe, which can't be read without moving its offset."""
        position = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        return cls(_claim_descriptor(os.dup(file)), position, sys.maxsize if count is None else count)

    def read(self) -> Iterator[bytes]:
        position, end = self.offset, self.offset + self.count
        while position < end and (block := os.pread(self.descriptor, min(FILE_BLOCK_BYTES, end - position), position)):
            position += len(block)
            yield block

    def close(self) -> None:
        os.close(self.descriptor)
        BACKGROUND_THREAD.file_slots.release()


def _claim_descriptor(descriptor: int) -> int:
    if not BACKGROUND_THREAD.file_slots.acquire(blocking=False):
        os.close(descriptor)
        raise OSError(f"{MAX_OPEN_FILES} files are open for recording, which is the maximum")
    return descriptor


class BodyBuffer:
    """The chunks of a body. For a long body, it holds the first `limit` bytes and a digest that the thread makes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0
        self.buffered_bytes = 0
        self.chunks: list[bytes] = []
        self.parts: list[bytes | FileRange] | None = None  # replaces chunks once a file is part of the body
        self._capacity = max(MIN_BUFFER_BYTES, limit)
        self._digest: hashlib.blake2b | None = None
        self._unhashed_chunks: list[bytes] = []  # not yet submitted to the thread
        self._unhashed_bytes = 0

    def add(self, chunk: bytes) -> None:
        """Add a chunk. Raises TypeError if it is not bytes, and OverflowError if the thread can't keep up."""
        if chunk.__class__ is not bytes:
            if not isinstance(chunk, bytes | bytearray | memoryview):
                raise TypeError(f"a chunk of a body must be bytes, got {type(chunk).__name__}")
            chunk = bytes(chunk)  # a copy, because the app may reuse the buffer
        self.length += len(chunk)
        if self.length <= self._capacity:
            self.buffered_bytes = self.length
            (self.chunks if self.parts is None else self.parts).append(chunk)
        elif self.parts is None:
            self._hash_chunk(chunk)
        else:
            raise OverflowError("can't record a body that contains a file and also exceeds the buffer")

    def add_file(self, part: FileRange) -> None:
        if self._digest is not None:
            part.close()
            raise OverflowError("can't record a body that contains a file and also exceeds the buffer")
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
            if not BACKGROUND_THREAD.has_room:
                raise OverflowError("a body arrived faster than the thread can hash")
            update, chunks = self._digest.update, self._unhashed_chunks
            BACKGROUND_THREAD.submit(lambda: _update_digest(update, chunks), self._unhashed_bytes)
            self._unhashed_chunks, self._unhashed_bytes = [], 0
        remaining = self.limit - self.buffered_bytes
        if remaining > 0:
            self.chunks.append(chunk[:remaining])
            self.buffered_bytes += min(remaining, len(chunk))

    @property
    def needs_thread(self) -> bool:
        return self._digest is not None or self.parts is not None

    def finish(self) -> None:
        """Complete the digest. Runs in the thread, after the submitted jobs. Raises OSError if a file can't be read."""
        if self._digest is not None:
            _update_digest(self._digest.update, self._unhashed_chunks)
            self._unhashed_chunks = []
        if self.parts is None:
            return
        content, self.length = bytearray(), 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in self.parts:
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
        """Return the body for the capture. Call it in the export: it may hash up to 64 KiB."""
        content = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        if self._digest is None or self.length <= self.limit:
            return small_body(content, self.limit)
        return Body(content[: self.limit], self.length, self._digest.hexdigest())


def small_body(content: bytes, limit: int) -> Body:
    if len(content) <= limit:
        return Body(content, len(content))
    return Body(content[:limit], len(content), digest(content))


def _update_digest(update: Callable[[bytes], None], chunks: list[bytes]) -> None:
    for chunk in chunks:
        update(chunk)


class RecorderHost(Protocol):
    """The part of ExporterPool that a recorder uses."""

    body_limit: int
    report_error: ErrorReporter

    def enqueue(self, recorder: RequestRecorder) -> None: ...

    def schedule_truncation(self, recorder: RequestRecorder) -> TimerHandle: ...


class RequestRecorder:
    """The state of a recorder, which the export reads. Subclasses watch one interface between server and app."""

    # Defaults are in the class, because most requests need few of these attributes and setting one takes time.
    headers: RawHeaders = []  # noqa: RUF012  # replaced, never changed
    trailers: RawHeaders | None = None  # a list once they are announced
    request_body: BodyBuffer | None = None
    response_body: BodyBuffer | None = None
    fast_path = True  # no body except `single_chunk`, and no error
    single_chunk: bytes = b""  # the body of the response, as long as it is one chunk
    status = 0
    response_ended = False  # the app sent its last message
    is_complete = False  # the server accepted the last message
    client_left = False
    truncated_by_deadline = False  # the capture was exported before the response ended
    truncation_timer: TimerHandle | None = None  # set if the response has several chunks
    exception = ""
    error = ""  # the operation that failed; the capture is dropped
    first_byte_ns = 0
    finished_ns = 0
    sent_ms = (
        b""  # when Envoy got the request or sent the copy, in ms since the epoch by its clock, and a mark; may be empty
    )
    in_flight = 0  # other requests in the process at the arrival
    by_envoy = False  # Envoy captured it
    is_times = False  # Envoy's times for a capture of the middleware
    app_returned = False  # the app returned, and so did its background tasks
    queued_effect_bytes = 0  # bytes of effects that the queue accounts for
    growth_bytes = 0  # of the bodies while the thread finished them, which the queue does not account for yet
    route = ""  # set by the export

    scope: Scope
    pair: bytes
    route_tags: RouteTags
    context: RequestContext
    _host: RecorderHost

    def __init__(
        self, host: RecorderHost, scope: Scope, pair: bytes, route_tags: RouteTags, context: RequestContext
    ) -> None:
        self._host = host
        self.scope = scope
        self.pair = pair
        self.route_tags = route_tags
        self.context = context

    def mark_app_finished(self, exception: str) -> None:
        """Handle the end of the app: it returned or raised. After its response, only effects are recorded."""
        self.app_returned = True
        self.context.response_sent = True
        if not self.finished_ns:
            self.exception = exception
            self._enqueue(perf_counter_ns())

    def truncate_at_deadline(self) -> None:
        """Export the part of the response that was sent so far, because its pair would time out."""
        if not self.finished_ns:
            self.truncated_by_deadline = self.app_returned = True
            self._enqueue(perf_counter_ns())

    def _ensure_response_body(self) -> BodyBuffer:
        """Return the buffer for a response of more than one small chunk."""
        if self.response_body is None:
            self.response_body = BodyBuffer(self._host.body_limit)
            self.fast_path = False
            if self.single_chunk:
                self.response_body.add(self.single_chunk)
                self.single_chunk = b""
        return self.response_body

    def _enqueue(self, finished_ns: int) -> None:
        self.finished_ns = finished_ns
        if self.truncation_timer is not None:
            self.truncation_timer.cancel()
        try:
            self._host.enqueue(self)
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self.close()
            self._host.report_error("queueing a capture", error)

    def _record_failure(self, operation: str, error: Exception) -> None:
        self.error = operation
        self.fast_path = False
        self._host.report_error(operation, error)

    def prepare_export(self, resolve_route: Callable[[Scope], str]) -> None:
        """Do the work that a capture needs and that the path of the request leaves to the export."""
        self.route = resolve_route(self.scope)

    @property
    def _bodies(self) -> list[BodyBuffer]:
        return [body for body in (self.request_body, self.response_body) if body is not None]

    @property
    def body_bytes(self) -> int:
        """The size of both bodies as far as they are buffered."""
        return len(self.single_chunk) + sum(body.buffered_bytes for body in self._bodies)

    @property
    def needs_thread(self) -> bool:
        return any(body.needs_thread for body in self._bodies)

    def finish(self) -> None:
        """Hash large bodies and read files. Runs in the thread."""
        try:
            for body in self._bodies:
                body.finish()
        except Exception as error:  # noqa: BLE001  # the queue drops and counts this capture
            self._record_failure("reading a body", error)
        finally:
            self.close()

    def close(self) -> None:
        """Close the descriptors of files."""
        for body in self._bodies:
            body.close()


class AsgiRecorder(RequestRecorder):
    def __init__(  # sets all attributes itself: a second call would take time in each request
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
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._record_failure("receive", error)
        return message

    async def send(self, message: Message) -> None:  # noqa: C901  # one function, because it runs in every request
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
                    # Set it before the server starts the next request.
                    self.response_ended = self.context.response_sent = True
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
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._record_failure("send", error)
        try:
            await self._send(message)
        except OSError:  # servers raise it if the client disconnected
            self.client_left = True
            raise
        if self.response_ended and not self.finished_ns:
            self.is_complete = True
            self._enqueue(perf_counter_ns())

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
        if self.scope["method"] == "HEAD" or self.truncated_by_deadline:  # not sent, or too late
            part.close()
        else:
            self._ensure_response_body().add_file(part)
