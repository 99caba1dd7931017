"""The WSGI middleware, for Flask, Django and other WSGI apps: docs/middleware.md.

A thread of the server calls the app and iterates over its response. One more thread per process exports the captures,
because WSGI servers have no event loop. It starts at the first sampled request, so that servers can fork before.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import Context
from functools import lru_cache
from time import perf_counter_ns
from typing import Any, Unpack
from urllib.parse import quote

from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext, run_cleanups
from abreast.errors import ErrorReporter, UnprovenCopyError
from abreast.export.exporter import MIN_TRUNCATION_DELAY_RATIO, TRUNCATION_DEADLINE_RATIO, ExporterPool
from abreast.export.queue import INVALID_HEADERS, UNPROVEN_COPY, UNPROVEN_LIVE, CaptureQueue, QueuedCapture
from abreast.export.routes import RouteResolver
from abreast.export.serializer import SAFE_PATH_CHARS
from abreast.export.transport import JoinResult
from abreast.middleware import MAX_PAIR_ID_CHARS, PAIR_ID_CHARS, REFUSAL, BaseMiddleware
from abreast.recorder import (
    BACKGROUND_THREAD,
    MIN_BUFFER_BYTES,
    BodyBuffer,
    FileRange,
    RequestRecorder,
    RouteTags,
    Scope,
)
from abreast.settings import Settings, SettingsKwargs

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[Any], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]


PAIR_KEY, VERSION_KEY, ROLE_KEY = "HTTP_X_ABREAST_PAIR", "HTTP_X_ABREAST_VERSION", "HTTP_X_ABREAST_ROLE"
COPIES_KEY, PROOF_KEY = "HTTP_X_ABREAST_COPIES", "HTTP_X_ABREAST_KEY"
NO_TAGS: tuple[None, list[tuple[str, str]]] = (None, [])
NOT_WSGI = "the app is not a WSGI app: it can't be called with environ and start_response"
STATUSES_WITHOUT_BODY = ("204", "304")
MAX_SCAN_INTERVAL_S = 0.5  # seconds between two searches for long responses
SCANS_PER_TIMEOUT = 20  # searches during pair_timeout
SHUTDOWN_MARGIN_S = 2.0  # seconds beyond flush_timeout
UNRECORDED_READS = frozenset({"read1", "readinto", "readinto1"})  # methods of a stream that PEP 3333 does not have
PARAMETER_PATTERN = re.compile(r"<(?:[^<>]*:)?(\w+)>")  # <int:id> of Flask and Django
GROUP_PATTERN = re.compile(r"\(\?P<(\w+)>[^()]*\)")  # (?P<id>[0-9]+) of Django's re_path


class SharedCaptureQueue(CaptureQueue):
    """A queue that the threads of requests share with the thread that exports."""

    def reset(self) -> None:
        self.lock = threading.RLock()
        super().reset()

    def reserve(self, recorder: RequestRecorder) -> int:
        with self.lock:
            return CaptureQueue.reserve(self, recorder)  # faster than super()

    def next_recorder(self) -> tuple[RequestRecorder, int] | None:
        with self.lock:
            return super().next_recorder()

    def account_growth(self, queued: QueuedCapture) -> None:
        with self.lock:
            super().account_growth(queued)

    def drop(self, reason: str, size: int, count: int = 1) -> None:
        with self.lock:
            super().drop(reason, size, count)

    def account_sent(self, batch: list[QueuedCapture], result: JoinResult | None) -> None:
        with self.lock:
            super().account_sent(batch, result)


class ExportThread(ExporterPool):
    """The exporter of a process, in a daemon thread with an event loop. It starts when it is needed."""

    queue: SharedCaptureQueue

    def __init__(
        self, settings: Settings, queue: SharedCaptureQueue, route_resolver: RouteResolver, report_error: ErrorReporter
    ) -> None:
        super().__init__(settings, queue, route_resolver, report_error)
        self._parent_loops: list[asyncio.AbstractEventLoop | None] = []
        self._reset()

    def _reset(self) -> None:
        self._start_lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_running = False
        self._thread: threading.Thread | None = None
        self._stop_event = asyncio.Event()
        self.open_recorders: set[WsgiRecorder] = set()

    def ensure_running(self) -> asyncio.AbstractEventLoop:
        """Return the loop of the thread, and start both if necessary."""
        loop = self._loop
        if loop is not None:
            return loop
        with self._start_lock:
            loop = self._loop
            if loop is None:
                loop, self._stop_event = asyncio.new_event_loop(), asyncio.Event()
                self._thread = threading.Thread(
                    target=Context().run,  # the thread must not count as a part of the request
                    args=(self._run, loop, self._stop_event),
                    name="abreast export",
                    daemon=True,
                )
                self._thread.start()
                atexit.register(self.close)
                self._loop, self.is_running = loop, True
            return loop

    def _run(self, loop: asyncio.AbstractEventLoop, stop_event: asyncio.Event) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._serve(stop_event))
        except Exception as error:  # noqa: BLE001  # there is no caller
            self.report_error("the export thread", error)
        finally:
            if self._loop is loop:
                self._loop, self.is_running = None, False  # the next capture starts another thread

    async def _serve(self, stop_event: asyncio.Event) -> None:
        self.start()
        interval_s = min(MAX_SCAN_INTERVAL_S, self.settings.pair_timeout / SCANS_PER_TIMEOUT)
        while not stop_event.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stop_event.wait()
            self._truncate_long_responses()
        await self.aclose()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:  # clean-ups of shadow requests
            await asyncio.wait(tasks, timeout=SHUTDOWN_MARGIN_S / 2)

    def _truncate_long_responses(self) -> None:
        """Have captures of long responses leave before their pairs time out, as schedule_truncation does for ASGI."""
        now_ns, timeout_ns = perf_counter_ns(), self.settings.pair_timeout * 1e9
        for recorder in list(self.open_recorders):
            first_chunk_ns = recorder.first_chunk_ns
            if first_chunk_ns and now_ns >= max(
                recorder.context.started_ns + TRUNCATION_DEADLINE_RATIO * timeout_ns,
                first_chunk_ns + MIN_TRUNCATION_DELAY_RATIO * timeout_ns,
            ):
                recorder.truncate_at_deadline()

    def enqueue(self, recorder: RequestRecorder) -> None:
        size = self.queue.reserve(recorder)
        if not size:
            return
        if recorder.fast_path or not recorder.needs_thread:
            count = self.queue.add(recorder, size)
            if count == 1 or count == self._batch_size or not self.is_running:  # noqa: PLR1714  # faster
                self._wake_thread()
        else:
            BACKGROUND_THREAD.submit(lambda: self._finish_and_add(recorder, size))

    def _finish_and_add(self, recorder: RequestRecorder, size: int) -> None:
        recorder.finish()
        self.queue.add(recorder, size)
        self._wake_thread()

    def _wake_thread(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the next exporter sends the capture
            self.ensure_running().call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._exporter is not None:  # a new one looks into the queue first
            self._exporter.wake_event.set()

    def count_drop(self, reason: str) -> None:
        with self.queue.lock:
            self.queue.drop_counts[reason] += 1
        if self.settings.enabled:
            try:
                self.ensure_running()
            except Exception as error:  # noqa: BLE001  # the caller still has to refuse the request
                self.report_error("start", error)

    def run_cleanups(self, context: RequestContext) -> None:
        """Run the clean-ups of a shadow request in the thread."""
        if context.cleanups:
            self.ensure_running().call_soon_threadsafe(run_cleanups, context, context=Context())
        else:
            context.cleanups = None

    def after_fork(self) -> None:
        super().after_fork()
        self._parent_loops.append(self._loop)  # kept: asyncio warns of an open loop that is destroyed
        self._reset()

    def close(self) -> None:
        """Send the queue for at most `flush_timeout` seconds, and end the thread. A later request starts another."""
        BACKGROUND_THREAD.drain(SHUTDOWN_MARGIN_S)  # it may still queue captures
        with self._start_lock:
            loop, thread, stop_event = self._loop, self._thread, self._stop_event
            self._loop, self.is_running = None, False
        if loop is None or thread is None:
            return
        atexit.unregister(self.close)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(stop_event.set)
        thread.join(self.settings.flush_timeout + SHUTDOWN_MARGIN_S)


class WsgiRecorder(RequestRecorder):
    """Watches one request. Its capture is queued when the server closes the response, or at the deadline.

    The thread that exports may truncate a capture, so a lock guards the recorded bodies. Without route tags, the
    recorder only keeps the context of the request.
    """

    _host: ExportThread
    first_chunk_ns = 0
    response_ended_ns = 0  # the iterable is exhausted
    _status = ""
    _rows: Sequence[tuple[str, str]] = ()  # with the headers of the middleware
    _rule = ""

    def __init__(
        self,
        host: ExportThread,
        environ: Environ,
        start_response: StartResponse,
        pair: bytes,
        route_tags: RouteTags | None,
        context: RequestContext,
        tag_headers: list[tuple[str, str]],
    ) -> None:
        self._host = host
        self._environ = environ.copy()
        self._app_environ = environ  # the app may change it
        self._start_response = start_response
        self._tag_headers = tag_headers
        self._lock = threading.Lock()
        self.pair = pair
        self.context = context
        if route_tags is None:
            self.finished_ns = context.started_ns
        else:
            self.route_tags = route_tags

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[Any], object]:
        is_known = headers.__class__ is list or headers.__class__ is tuple  # anything else is for the server to refuse
        rows = headers.__class__([*headers, *self._tag_headers]) if is_known else headers
        if exc_info is None:
            self._write = self._start_response(status, rows)
        else:
            self._write = self._start_response(status, rows, exc_info)
        if not self.finished_ns:
            self.first_byte_ns = self.first_byte_ns or perf_counter_ns()
            self._status, self._rows = status, rows
            if "werkzeug.request" in self._app_environ:  # Flask removes its request before it returns
                self._record_rule(None)
            if not is_known:
                self._record_failure(
                    "start_response", TypeError(f"headers must be a list, got {type(headers).__name__}")
                )
        return self.write

    def write(self, chunk: Any) -> object:
        self.record_chunk(chunk)
        try:
            return self._write(chunk)
        except OSError:  # servers raise it if the client disconnected
            self.client_left = True
            raise

    def record_chunk(self, chunk: Any) -> None:
        """Record a chunk of a response that may go on, so that its capture may be truncated."""
        try:
            with self._lock:
                if self.finished_ns:
                    return
                if chunk and not self.first_chunk_ns:
                    self.first_chunk_ns = perf_counter_ns()
                    self._host.open_recorders.add(self)
                    if not self._host.is_running:
                        self._host.ensure_running()  # it truncates the capture at the deadline
                self._add_chunk(chunk)
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._record_failure("the response", error)

    def _add_chunk(self, chunk: Any) -> None:
        if not chunk:
            return
        if (
            self.single_chunk
            or self.response_body is not None
            or chunk.__class__ is not bytes
            or len(chunk) > MIN_BUFFER_BYTES
        ):
            self._ensure_response_body().add(chunk)
        else:
            self.single_chunk = chunk

    def record_input(self, chunk: bytes) -> None:
        try:
            with self._lock:
                if not chunk or self.finished_ns:
                    return
                if self.request_body is None:
                    self.request_body = BodyBuffer(self._host.body_limit)
                    self.fast_path = False
                self.request_body.add(chunk)
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._record_failure("wsgi.input", error)

    def fail_input(self, name: str) -> None:
        """Drop the capture, because the app reads its request in a way that is not recorded."""
        self._record_failure("wsgi.input", TypeError(f"can't record a request that the app reads with {name}()"))

    def watch(self, response: Any) -> Any:
        """Return the response, or an iterable that records it. Never raises."""
        try:
            if response.__class__ is list or response.__class__ is tuple:  # the server may need its length
                with self._lock:
                    if not self.finished_ns:
                        for chunk in response:
                            self._add_chunk(chunk)
                self.end(is_complete=True)
                return response
            if "django" in sys.modules and not self.finished_ns:
                self._record_rule(response)
            if self._is_server_file(response):
                return self._watch_file(response)
            return (SizedResponse if hasattr(response, "__len__") else RecordedResponse)(self, response)
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._record_failure("the response", error)
            self.end(is_complete=False)
            return response

    def _record_rule(self, response: Any) -> None:
        try:
            rule = _find_rule(self._app_environ, response)
            if rule:  # with the part of the path that a dispatcher took off
                script_name: str = self._app_environ.get("SCRIPT_NAME", "")
                self._rule = script_name.removeprefix(self._environ.get("SCRIPT_NAME", "")) + rule
        except Exception as error:  # noqa: BLE001  # the capture has no route
            self._host.report_error("finding a route", error)

    def _is_server_file(self, response: Any) -> bool:
        """Return True if the server may send the response with sendfile, so that it must get it as it is."""
        wrapper = self._environ.get("wsgi.file_wrapper")
        if wrapper is None or not (
            isinstance(response, wrapper) if isinstance(wrapper, type) else hasattr(response, "read")
        ):
            return False
        try:
            os.lseek(getattr(response, "filelike", response).fileno(), 0, os.SEEK_CUR)
        except Exception:  # noqa: BLE001  # no descriptor, or a pipe: the server iterates
            return False
        return True

    def _watch_file(self, file: Any) -> Any:
        try:
            if not self.finished_ns and self._environ["REQUEST_METHOD"] != "HEAD":
                length = next((int(value) for name, value in self._rows if name.lower() == "content-length"), None)
                part = FileRange.from_descriptor(getattr(file, "filelike", file).fileno(), None, length)
                with self._lock:
                    self._ensure_response_body().add_file(part)
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._record_failure("a file", error)
        close_file = getattr(file, "close", None)

        def close() -> None:
            error = sys.exc_info()[1]  # servers close the response in a `finally`
            self.client_left = isinstance(error, OSError)
            self.close_response(close_file, is_complete=error is None)

        try:
            file.close = close
        except Exception:  # noqa: BLE001  # an object of C: its end goes unnoticed
            self.end(is_complete=True)
        return file

    def close_response(self, close: Callable[[], object] | None, *, is_complete: bool) -> None:
        """Run the code of the app that ends its response."""
        outer_context = CURRENT_CONTEXT.get()
        CURRENT_CONTEXT.set(self.context)
        try:
            if close is not None:
                close()
        finally:
            CURRENT_CONTEXT.set(outer_context)
            self.end(is_complete=is_complete)

    @property
    def has_no_body(self) -> bool:
        """True if servers need not iterate over the response."""
        return self._environ.get("REQUEST_METHOD") == "HEAD" or self._status.startswith(STATUSES_WITHOUT_BODY)

    def end(self, *, is_complete: bool) -> None:
        """Queue the capture, unless it was truncated. Never raises."""
        try:
            self.context.response_sent = self.app_returned = True
            with self._lock:
                if not self.finished_ns:
                    self.is_complete = is_complete
                    self._enqueue(self.response_ended_ns or perf_counter_ns())
            if self.first_chunk_ns:
                self._host.open_recorders.discard(self)
            if self.context.cleanups is not None:
                self._host.run_cleanups(self.context)
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self._host.report_error("the end of a request", error)

    def truncate_at_deadline(self) -> None:
        with self._lock:
            super().truncate_at_deadline()
        self._host.open_recorders.discard(self)

    def prepare_export(self, _resolve_route: Callable[[Scope], str]) -> None:
        """Convert the request and the headers to the form that ASGI has."""
        self.scope = _build_scope(self._environ)
        self.route = _make_template(self._rule)
        self.status = int(self._status[:3]) if self._status else 0
        rows = self._rows[: len(self._rows) - len(self._tag_headers)]
        self.headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in rows]
        self._environ = self._app_environ = {}  # they hold objects of the server and of the app
        if not self.truncated_by_deadline:
            vars(self).pop("_start_response", None)
            vars(self).pop("_write", None)


class RecordedResponse:
    """The response of an app. Its code runs in the context of the request, whatever thread the server uses."""

    _iterator: Iterator[bytes] | None = None

    def __init__(self, recorder: WsgiRecorder, response: Any) -> None:
        self._recorder = recorder
        self._response = response

    def __iter__(self) -> RecordedResponse:
        outer_context = CURRENT_CONTEXT.get()
        CURRENT_CONTEXT.set(self._recorder.context)
        try:
            self._iterator = iter(self._response)
        finally:
            CURRENT_CONTEXT.set(outer_context)
        return self

    def __next__(self) -> bytes:
        recorder, outer_context = self._recorder, CURRENT_CONTEXT.get()
        if self._iterator is None:
            iter(self)
        CURRENT_CONTEXT.set(recorder.context)
        try:
            chunk = next(self._iterator)  # type: ignore[arg-type]  # set above
        except StopIteration:
            recorder.response_ended_ns = perf_counter_ns()
            recorder.context.response_sent = True
            raise
        except BaseException as error:
            recorder.exception = type(error).__name__
            recorder.end(is_complete=False)
            raise
        finally:
            CURRENT_CONTEXT.set(outer_context)
        recorder.record_chunk(chunk)
        return chunk

    def close(self) -> None:
        recorder = self._recorder
        is_complete = bool(recorder.response_ended_ns) or recorder.has_no_body
        if not is_complete and not recorder.exception:
            recorder.client_left = True
        recorder.close_response(getattr(self._response, "close", None), is_complete=is_complete)


class SizedResponse(RecordedResponse):
    """A response with a length, from which servers derive the header Content-Length."""

    def __len__(self) -> int:
        return len(self._response)


class RecordedInput:
    """Records `wsgi.input` as far as the app reads it."""

    __slots__ = ("_recorder", "_stream")

    def __init__(self, recorder: WsgiRecorder, stream: Any) -> None:
        self._recorder = recorder
        self._stream = stream

    def read(self, *size: Any) -> bytes:
        chunk: bytes = self._stream.read(*size)
        self._recorder.record_input(chunk)
        return chunk

    def readline(self, *size: Any) -> bytes:
        line: bytes = self._stream.readline(*size)
        self._recorder.record_input(line)
        return line

    def readlines(self, *hint: Any) -> list[bytes]:
        lines: list[bytes] = self._stream.readlines(*hint)
        for line in lines:
            self._recorder.record_input(line)
        return lines

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            self._recorder.record_input(line)
            yield line

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stream, name)
        if name in UNRECORDED_READS:
            self._recorder.fail_input(name)
        return value


class ParallelRunMiddleware(BaseMiddleware):
    """Captures the responses of a WSGI app to requests that Envoy sampled, as the middleware for ASGI does.

    Settings are the fields of abreast.settings.Settings. Variables ABREAST_<NAME> set the ones that are not passed.
    An invalid setting disables the middleware and logs an error, which `problem` holds.
    """

    _exporter_pool: ExportThread

    def __init__(self, app: App, *arguments: object, **settings: Unpack[SettingsKwargs]) -> None:
        is_wsgi_app = _is_wsgi_app(app)
        super().__init__(app, _find_patched_threads() if is_wsgi_app else NOT_WSGI, arguments, settings)
        if not is_wsgi_app:
            self.__class__ = NonWsgiMiddleware
        queue = SharedCaptureQueue(self.settings)
        self.queue = queue
        self._exporter_pool = ExportThread(self.settings, queue, RouteResolver(app), self.report_error)
        self._in_flight: set[int] = set()  # ids of the environs of requests in the app; threads can't miscount a set
        self._tags: dict[tuple[str, ...], tuple[RouteTags | None, list[tuple[str, str]]]] = {
            (version, role, str(expected_captures)): (
                tags,
                [(name.decode("latin-1"), value.decode("latin-1")) for name, value in tags[3]],
            )
            for tags in self._build_route_tags().values()
            for version, role, expected_captures in [tags[:3]]
        }

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        outer_context, recorder = CURRENT_CONTEXT.get(), None
        if outer_context.response_sent:  # the thread served a request that has ended
            outer_context = NO_REQUEST
            CURRENT_CONTEXT.set(NO_REQUEST)
        request_id = id(environ)
        self._in_flight.add(request_id)
        try:
            if PAIR_KEY in environ:
                try:
                    recorder = self._make_recorder(environ, start_response)
                except UnprovenCopyError:
                    length = str(len(REFUSAL))
                    start_response("403 Forbidden", [("Content-Type", "text/plain"), ("Content-Length", length)])
                    return [REFUSAL]
                except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
                    self.report_error("request", error)
            if recorder is None:
                return self.app(environ, start_response)  # type: ignore[no-any-return]
            try:
                response = self.app(environ, recorder.start_response)
            except BaseException as error:  # the context stays, for outer error handlers
                recorder.exception = type(error).__name__
                recorder.end(is_complete=False)
                raise
        finally:
            self._in_flight.discard(request_id)
        watched = recorder.watch(response)
        CURRENT_CONTEXT.set(outer_context)
        return watched  # type: ignore[no-any-return]

    def _make_recorder(self, environ: Environ, start_response: StartResponse) -> WsgiRecorder | None:
        """Take Envoy's headers off the environ, check them, and set the context.

        Return None for an ordinary live request. Raise UnprovenCopyError for a copy that Envoy did not send. A server
        joins the values of a repeated header, which makes them unknown: the request is not captured.
        """
        pop, pool = environ.pop, self._exporter_pool
        pair, version, role = pop(PAIR_KEY), pop(VERSION_KEY, None), pop(ROLE_KEY, None)
        copies, proof = pop(COPIES_KEY, None), pop(PROOF_KEY, None)
        if version is None or role is None or copies is None:
            pool.count_drop(INVALID_HEADERS)
            return None
        if self._edge_keys is not None and not self._is_proven(proof and proof.encode("latin-1")):
            if role == "live":
                pool.count_drop(UNPROVEN_LIVE)
                return None
            pool.count_drop(UNPROVEN_COPY)
            raise UnprovenCopyError
        pair_id = pair.encode("latin-1")
        expected_captures, _, sent_ms = copies.partition(" ")
        route_tags, tag_headers = self._tags.get((version, role, expected_captures), NO_TAGS)
        if (
            route_tags is None
            or pair_id.translate(None, PAIR_ID_CHARS)
            or not 0 < len(pair) <= MAX_PAIR_ID_CHARS
            or not self._enabled
        ):
            context = self._make_uncaptured_context(pair_id, version.encode("latin-1"), role.encode("latin-1"))
            recorder = WsgiRecorder(pool, environ, start_response, pair_id, None, context, [])
            if "," in pair:
                pool.count_drop(INVALID_HEADERS)
        else:
            context = route_tags[4](pair, perf_counter_ns())
            tag_headers = [("x-abreast-pair", pair), *tag_headers]
            recorder = WsgiRecorder(pool, environ, start_response, pair_id, route_tags, context, tag_headers)
            recorder.sent_ms, recorder.in_flight = sent_ms.encode("latin-1"), len(self._in_flight) - 1
        if context.is_shadow:
            context.cleanups = []
        if environ["REQUEST_METHOD"] != "GET" or environ.get("CONTENT_LENGTH") or "HTTP_TRANSFER_ENCODING" in environ:
            environ["wsgi.input"] = RecordedInput(recorder, environ["wsgi.input"])
        CURRENT_CONTEXT.set(context)
        return recorder

    def close(self) -> None:
        """Send the queue for at most `flush_timeout` seconds. The end of the process does it too. Never raises."""
        try:
            self._exporter_pool.close()
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self.report_error("close", error)


class NonWsgiMiddleware(ParallelRunMiddleware):
    """Passes calls to an app that is not a WSGI app. Servers detect the kind of such an app by its `__call__`."""

    async def __call__(self, *arguments: Any) -> Any:  # type: ignore[override]
        return await self.app(*arguments)


def _find_patched_threads() -> str:
    """Return the problem if threads are green: the loop of the export would run in the thread of the requests."""
    for library, module_name, function, name in (
        ("gevent", "gevent.monkey", "is_module_patched", "threading"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched", "thread"),
    ):
        module = sys.modules.get(module_name)
        if module is not None and getattr(module, function)(name):
            return f"{library} has patched threads, and the middleware needs a real one; let Envoy capture this version"
    return ""


def _is_wsgi_app(app: object) -> bool:
    try:
        inspect.signature(app).bind(None, None)  # type: ignore[arg-type]  # raises TypeError if it isn't callable
    except TypeError:
        return False
    except ValueError:  # an extension module without signatures
        return True
    return True


def _find_rule(environ: Environ, response: Any) -> str:
    """Return the pattern of the matched route, or an empty string. The frameworks are not imported.

    Flask has its request in the environ until the app returns. A response of Django closes its request. The server's
    wrapper of a Django file closes the response.
    """
    rule = getattr(getattr(environ.get("werkzeug.request"), "url_rule", None), "rule", None)
    if rule is not None:
        return str(rule)
    closers = getattr(response, "_resource_closers", None)
    if closers is None:
        file = getattr(response, "filelike", response)
        closers = getattr(getattr(getattr(file, "close", None), "__self__", None), "_resource_closers", None) or ()
    for close in closers:
        match = getattr(getattr(close, "__self__", None), "resolver_match", None)
        if match is not None:
            return f"/{match.route}"
    return ""


@lru_cache(maxsize=4096)
def _make_template(rule: str) -> str:
    """Return the template in the form of ASGI frameworks: /products/{id}."""
    if rule.startswith("/^") or "(?P<" in rule:  # a regular expression of Django
        rule = "/" + GROUP_PATTERN.sub(r"{\1}", rule).lstrip("/^").removesuffix("\\Z").removesuffix("$")
    return PARAMETER_PATTERN.sub(r"{\1}", rule)


def _build_scope(environ: Environ) -> Scope:
    """Return the parts of an ASGI scope that a capture needs."""
    path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1")
    raw_path = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""  # not in PEP 3333, but as sent
    if not raw_path.startswith("/"):
        raw_path = quote(path or b"/", safe=SAFE_PATH_CHARS)
    return {
        "method": environ["REQUEST_METHOD"],
        "path": path.decode("utf-8", "replace"),
        "raw_path": raw_path.encode("latin-1"),
        "query_string": environ.get("QUERY_STRING", "").encode("latin-1"),
        "headers": [
            (_header_name(key), value.encode("latin-1"))
            for key, value in environ.items()
            if key.startswith("HTTP_") or (key in {"CONTENT_TYPE", "CONTENT_LENGTH"} and value)
        ],
    }


@lru_cache(maxsize=1024)
def _header_name(key: str) -> bytes:
    return key.removeprefix("HTTP_").replace("_", "-").lower().encode("latin-1")
