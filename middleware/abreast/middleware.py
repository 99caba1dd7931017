"""The ASGI middleware. It adds microseconds to a sampled request, and less than one to any other: docs/middleware.md."""

from __future__ import annotations

import inspect
import logging
import os
import string
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hmac import compare_digest
from time import perf_counter_ns
from typing import Any, Unpack, get_args

from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext, make_context_factory, run_cleanups
from abreast.errors import ErrorReporter, SettingError, UnprovenCopyError
from abreast.export.exporter import ExporterPool
from abreast.export.queue import INVALID_HEADERS, UNPROVEN_COPY, UNPROVEN_LIVE, CaptureQueue
from abreast.export.routes import RouteResolver
from abreast.protocol.capture import Role, Version
from abreast.recorder import PAIR_HEADER, AsgiRecorder, Message, RawHeaders, Receive, RouteTags, Scope, Send
from abreast.settings import ENV_PREFIX, Settings, SettingsKwargs, edge_keys

App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("abreast")

VERSION_HEADER = b"x-abreast-version"
ROLE_HEADER = b"x-abreast-role"
COPIES_HEADER = b"x-abreast-copies"  # the number of captures of the pair, and when Envoy got or sent the request (ms)
KEY_HEADER = b"x-abreast-key"  # the proof that Envoy adds
ENVOY_HEADERS = frozenset({PAIR_HEADER, VERSION_HEADER, ROLE_HEADER, COPIES_HEADER, KEY_HEADER})
TRANSFER_ENCODING_HEADER = b"transfer-encoding"
SCOPE_KEY = "abreast.current"  # in the scope of a request that an outer middleware records
VERSION_BY_HEADER: dict[bytes | None, Version] = {each.encode(): each for each in get_args(Version)}
ROLE_BY_HEADER: dict[bytes, Role] = {each.encode(): each for each in get_args(Role)}
PAIR_ID_CHARS = (string.digits + string.ascii_letters + "-").encode()  # allowed in a pair id
MAX_PAIR_ID_CHARS = 64
NOT_ASGI = "the app is not an ASGI app: it can't be called with scope, receive and send"
REFUSAL = b"x-abreast-key is missing or wrong\n"


@dataclass
class UncapturedRequest:
    """Stands in for an AsgiRecorder if a request is not captured."""

    context: RequestContext
    receive: Receive
    _send: Send
    app_returned: bool = False
    finished_ns: int = 0  # as in AsgiRecorder, so that mark_app_finished is called

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.context.response_sent = True
        await self._send(message)

    def mark_app_finished(self, _exception: str) -> None:
        self.context.response_sent = True


class BaseMiddleware:
    """The settings of a middleware and the check of Envoy's headers, which ASGI and WSGI share."""

    queue: CaptureQueue
    _exporter_pool: ExporterPool
    _route_tags: dict[tuple[bytes | None, ...], RouteTags]

    def __init__(self, app: Any, problem: str, arguments: tuple[object, ...], settings: SettingsKwargs) -> None:
        """Read the settings. `problem` is the reason why the app can't be recorded, if there is one."""
        self.app = app
        self.problem = problem
        try:
            if problem:
                raise SettingError(problem)  # noqa: TRY301
            if arguments:
                raise SettingError("settings are keyword arguments such as service='shop', got a positional argument")  # noqa: TRY301
            self.settings = Settings.from_environment(os.environ, settings)
        except Exception as error:  # noqa: BLE001  # misuse must not fail requests
            self.problem = str(error) if isinstance(error, SettingError) else repr(error)
            self.settings = Settings(enabled=False)
            logger.error("the middleware is off, requests pass untouched: %s", self.problem)  # noqa: TRY400  # no traceback
        self._edge_keys = _read_edge_keys(settings)
        self._edge_key = self._edge_keys[0].decode() if self._edge_keys else ""
        self.report_error = ErrorReporter()
        self._enabled = self.settings.enabled
        self._release = self.settings.release

    def _build_route_tags(self) -> dict[tuple[bytes | None, ...], RouteTags]:
        release = self.settings.release.encode("ascii")
        release_headers = [(b"x-abreast-release", release)] if release else []
        return {
            (version.encode(), role.encode(), b"%d" % expected_captures): (
                version,
                role,
                expected_captures,
                [(VERSION_HEADER, version.encode()), *release_headers],
                make_context_factory(version, role, self._release, self.queue, self._edge_key),
            )
            for version in get_args(Version)
            for role in get_args(Role)
            for expected_captures in (2, 3)
        }

    def _is_proven(self, proof: bytes | None) -> bool:
        return proof is not None and any(compare_digest(proof, key) for key in self._edge_keys or ())

    def _make_uncaptured_context(self, pair: bytes, version: bytes, role: bytes) -> RequestContext:
        """Return the context of a marked request without a capture.

        A shadow is a shadow even if capturing is disabled or a value is unknown.
        """
        return RequestContext(
            VERSION_BY_HEADER.get(version),
            ROLE_BY_HEADER.get(role, "shadow"),
            pair.decode("latin-1"),
            self._release,
            started_ns=perf_counter_ns(),
            edge_key=self._edge_key,
        )


class ParallelRunMiddleware(BaseMiddleware):
    """Captures the responses of the app to requests that Envoy sampled, and sends them to Redis in the background.

    Settings are the fields of abreast.settings.Settings. Variables ABREAST_<NAME> set the ones that are not passed.
    An invalid setting disables the middleware and logs an error, which `problem` holds. It is not raised, because
    Starlette constructs its middleware at the first request, and an exception would be a 500 for every user. An app
    that is not an ASGI app gets its calls as they are: a WSGI app needs abreast.wsgi.ParallelRunMiddleware.
    """

    def __init__(self, app: App, *arguments: object, **settings: Unpack[SettingsKwargs]) -> None:
        is_asgi_app = _is_asgi_app(app)
        super().__init__(app, "" if is_asgi_app else NOT_ASGI, arguments, settings)
        if not is_asgi_app:
            self.__class__ = NonAsgiMiddleware
        self.queue = CaptureQueue(self.settings)
        self._exporter_pool = ExporterPool(self.settings, self.queue, RouteResolver(app), self.report_error)
        self._route_tags = self._build_route_tags()
        self.in_flight = 0  # HTTP requests in the app, sampled or not

    async def __call__(  # noqa: C901, PLR0912  # one function, because it runs in every request
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        kind, pair_header = scope["type"], PAIR_HEADER  # a local variable is faster
        if kind == "http" or kind == "websocket":  # noqa: PLR1714  # faster
            outer_context, recorder, has_inherited_context = CURRENT_CONTEXT.get(), None, False
            is_counted = kind == "http"  # a websocket is idle most of the time
            self.in_flight += is_counted
            try:
                try:
                    headers = scope["headers"]
                    if headers.__class__ is not list:
                        headers = scope["headers"] = list(headers)  # for the app, because an iterator can be read once
                    for name, _ in reversed(headers):  # Envoy adds to the end
                        if name == pair_header:
                            recorder = self._make_recorder(scope, receive, send)
                            break
                    if recorder is None:
                        if SCOPE_KEY in scope:  # an outer middleware took Envoy's headers
                            # Middleware in between may have started a new context.
                            CURRENT_CONTEXT.set(scope[SCOPE_KEY])
                        else:
                            # A server may start this request in the context of a previous one.
                            has_inherited_context = outer_context.response_sent
                except UnprovenCopyError:
                    await _refuse(scope, receive, send)
                    return
                except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
                    self.report_error("request", error)
                if recorder is not None:
                    try:
                        await self.app(scope, recorder.receive, recorder.send)
                    except BaseException as error:  # the context stays, for outer error handlers
                        recorder.mark_app_finished(type(error).__name__)
                        run_cleanups(recorder.context)
                        raise
                    recorder.app_returned = True
                    if not recorder.finished_ns:
                        recorder.mark_app_finished("")
                    if recorder.context.is_shadow:
                        run_cleanups(recorder.context)
                    CURRENT_CONTEXT.set(outer_context)
                    return
                if has_inherited_context:
                    CURRENT_CONTEXT.set(NO_REQUEST)
                    await self.app(scope, receive, send)
                    CURRENT_CONTEXT.set(outer_context)
                    return
                await self.app(scope, receive, send)
                return
            finally:
                self.in_flight -= is_counted
        elif kind == "lifespan" and self._enabled:
            await self._handle_lifespan(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _make_recorder(self, scope: Scope, receive: Receive, send: Send) -> AsgiRecorder | UncapturedRequest | None:
        """Take Envoy's headers off the scope, check them, and set the context.

        Return None for an ordinary live request. Raise UnprovenCopyError for a copy that Envoy did not send.
        """
        headers = scope["headers"]
        scope["headers"] = app_headers = [header for header in headers if header[0] not in ENVOY_HEADERS]
        values = dict(headers)
        pair, version, role = values[PAIR_HEADER], values.get(VERSION_HEADER), values.get(ROLE_HEADER)
        copies, proof = values.get(COPIES_HEADER), values.get(KEY_HEADER)
        if (
            version is None
            or role is None
            or copies is None
            or len(headers) - len(app_headers) != (4 if proof is None else 5)  # a name is repeated
        ):
            self._exporter_pool.count_drop(INVALID_HEADERS)
            return None
        if self._edge_keys is None:
            if TRANSFER_ENCODING_HEADER in values and _has_pair_in_trailers(headers):
                self._exporter_pool.count_drop(INVALID_HEADERS)
                return None
        elif not self._is_proven(proof):
            if role == b"live" or (TRANSFER_ENCODING_HEADER in values and _has_pair_in_trailers(headers)):
                self._exporter_pool.count_drop(UNPROVEN_LIVE)
                return None
            self._exporter_pool.count_drop(UNPROVEN_COPY)
            raise UnprovenCopyError

        recorder: AsgiRecorder | UncapturedRequest
        expected_captures, _, sent_ms = copies.partition(b" ")
        route_tags = self._route_tags.get((version, role, expected_captures))
        if (
            route_tags is None
            or pair.translate(None, PAIR_ID_CHARS)
            or not 0 < len(pair) <= MAX_PAIR_ID_CHARS
            or not self._enabled
            or scope["type"] != "http"
        ):
            context = self._make_uncaptured_context(pair, version, role)
            recorder = UncapturedRequest(context, receive, send)
        else:
            context = route_tags[4](pair.decode(), perf_counter_ns())
            recorder = AsgiRecorder(self._exporter_pool, scope, receive, send, pair, route_tags, context)
            recorder.sent_ms, recorder.in_flight = sent_ms, self.in_flight - 1
        if context.is_shadow:
            context.cleanups = []
        CURRENT_CONTEXT.set(context)
        scope[SCOPE_KEY] = context
        return recorder

    async def _handle_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Connect at startup, and send the queue before the server learns that the app has stopped."""

        async def send_after_flush(message: Message) -> None:
            if message["type"] in {"lifespan.shutdown.complete", "lifespan.shutdown.failed"}:
                await self.aclose()
            await send(message)

        try:
            self._exporter_pool.start()
        except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
            self.report_error("start", error)
        await self.app(scope, receive, send_after_flush)

    async def aclose(self) -> None:
        """Send the queue for at most `flush_timeout` seconds, and close the connection to Redis. Never raises.

        Call it only if neither the server's lifespan nor the end of the event loop does it.
        """
        await self._exporter_pool.aclose()


class NonAsgiMiddleware(ParallelRunMiddleware):
    """Passes calls to an app that is not an ASGI app. Servers detect the kind of such an app by its `__call__`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.app(*arguments, **options)


def _is_asgi_app(app: object) -> bool:
    try:
        inspect.signature(app).bind(None, None, None)  # type: ignore[arg-type]  # raises TypeError if it isn't callable
    except TypeError:
        return False
    except ValueError:  # an extension module without signatures
        return True
    return True


def _read_edge_keys(settings: Mapping[str, Any]) -> list[bytes] | None:
    """Return the valid keys, or None if no proof is needed. Other settings that are invalid don't change them."""
    value = settings.get("edge_key") or os.environ.get(f"{ENV_PREFIX}EDGE_KEY")
    if not value:
        return None
    try:
        return [key.encode() for key in edge_keys(value)]
    except ValueError:
        return []


def _has_pair_in_trailers(headers: RawHeaders) -> bool:
    """Return True if the pair id follows the transfer encoding, which Envoy sends last.

    uvicorn with httptools adds trailers to the headers.
    """
    names = [name for name, _ in headers]
    return names.index(PAIR_HEADER) > names.index(TRANSFER_ENCODING_HEADER)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})  # the server responds with 403
        return
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(REFUSAL))]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSAL})
