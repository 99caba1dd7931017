"""The ASGI middleware. It adds about 5 µs to a sampled request, and far less to any other."""

from __future__ import annotations

import logging
import os
import string
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Unpack, get_args

from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext, make_context_factory, run_cleanups
from abreast.errors import ErrorReporter, SettingError
from abreast.export.exporter import ExporterPool
from abreast.export.queue import CaptureQueue
from abreast.export.routes import RouteResolver
from abreast.protocol.capture import Role, Version
from abreast.recorder import PAIR_HEADER, Message, Receive, RequestRecorder, RouteTags, Scope, Send
from abreast.settings import Settings, SettingsKwargs

App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("abreast")

VERSION_HEADER = b"x-abreast-version"
ROLE_HEADER = b"x-abreast-role"
COPIES_HEADER = b"x-abreast-copies"
SCOPE_KEY = "abreast.current"  # in the scope of a request that an outer middleware records
VERSION_BY_HEADER: dict[bytes | None, Version] = {each.encode(): each for each in get_args(Version)}
ROLE_BY_HEADER: dict[bytes, Role] = {each.encode(): each for each in get_args(Role)}
TRAILING_HEADERS = 8  # Envoy adds its headers to the end
PAIR_ID_CHARS = (string.digits + string.ascii_letters + "-").encode()  # allowed in a pair id
MAX_PAIR_ID_CHARS = 64


class UncapturedRequest:
    """Stands in for a RequestRecorder if a request is not captured."""

    app_returned = False
    finished_ns = 0  # as in RequestRecorder, so that mark_app_finished is called

    def __init__(
        self,
        context: RequestContext,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self.context = context
        self._send = send
        self.receive = receive

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.context.response_sent = True
        await self._send(message)

    def mark_app_finished(self, _exception: str) -> None:
        self.context.response_sent = True


class ParallelRunMiddleware:
    """Captures the answers of the app to requests that Envoy sampled, and sends them to Redis in the background.

    Settings are the fields of abreast.settings.Settings. Variables ABREAST_<NAME> set the ones that are not passed.
    An invalid setting disables the middleware and logs an error, which `problem` holds. It is not raised, because
    Starlette constructs its middleware at the first request, and an exception would be a 500 for every user.
    """

    def __init__(self, app: App, **settings: Unpack[SettingsKwargs]) -> None:
        self.app = app
        self.problem = ""
        self.settings = self._read_settings(settings)
        self.report_error = ErrorReporter()
        self.queue = CaptureQueue(self.settings)
        self._exporter_pool = ExporterPool(self.settings, self.queue, RouteResolver(app), self.report_error)
        self._enabled = self.settings.enabled
        self._release = self.settings.release
        self._route_tags = self._build_route_tags()

    def _read_settings(self, settings: SettingsKwargs) -> Settings:
        try:
            return Settings.from_environment(os.environ, settings)
        except SettingError as error:
            self.problem = str(error)
            logger.error("the middleware is off, requests pass untouched: %s", error)  # noqa: TRY400  # no traceback
            return Settings(enabled=False)

    def _build_route_tags(self) -> dict[tuple[bytes | None, ...], RouteTags]:
        release = self.settings.release.encode("ascii")
        release_headers = [(b"x-abreast-release", release)] if release else []
        return {
            (version.encode(), role.encode(), b"%d" % expected_captures): (
                version,
                role,
                expected_captures,
                [(VERSION_HEADER, version.encode()), *release_headers],
                make_context_factory(version, role, self._release, self.queue),
            )
            for version in get_args(Version)
            for role in get_args(Role)
            for expected_captures in (2, 3)
        }

    async def __call__(  # noqa: C901  # one function, because it runs in every request
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        kind = scope["type"]
        if kind == "http" or kind == "websocket":  # noqa: PLR1714  # faster
            outer_context, recorder, has_inherited_context = CURRENT_CONTEXT.get(), None, False
            try:
                headers = scope["headers"]
                if headers.__class__ is not list:
                    headers = scope["headers"] = list(headers)  # for the app, because an iterator can be read once
                for name, _ in reversed(headers):  # Envoy adds to the end
                    if name == PAIR_HEADER:
                        recorder = self._make_recorder(scope, receive, send)
                        break
                else:
                    # A server may start this request in the context of a previous one.
                    has_inherited_context = outer_context.response_sent
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
        elif kind == "lifespan" and self._enabled:
            await self._handle_lifespan(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _make_recorder(self, scope: Scope, receive: Receive, send: Send) -> RequestRecorder | UncapturedRequest | None:
        """Return the recorder of a request with Envoy's headers, or None if an outer middleware has one. Set the context."""
        if SCOPE_KEY in scope:
            CURRENT_CONTEXT.set(scope[SCOPE_KEY])  # middleware in between may have started a new context
            return None
        headers = scope["headers"]
        try:
            header_values = dict(headers[-TRAILING_HEADERS:])
            pair = header_values[PAIR_HEADER]
            route_tags = self._route_tags.get(
                (header_values[VERSION_HEADER], header_values[ROLE_HEADER], header_values[COPIES_HEADER])
            )
        except KeyError:
            header_values = dict(headers)
            pair = header_values[PAIR_HEADER]
            route_tags = self._route_tags.get(
                (header_values.get(VERSION_HEADER), header_values.get(ROLE_HEADER), header_values.get(COPIES_HEADER))
            )
        if (
            route_tags is None
            or pair.translate(None, PAIR_ID_CHARS)
            or not 0 < len(pair) <= MAX_PAIR_ID_CHARS
            or not self._enabled
            or scope["type"] != "http"
        ):
            return self._wrap_uncaptured(header_values, receive, send)
        context = route_tags[4](pair.decode(), perf_counter_ns())
        if context.is_shadow:
            context.cleanups = []
        CURRENT_CONTEXT.set(context)
        scope[SCOPE_KEY] = context
        return RequestRecorder(self._exporter_pool, scope, receive, send, pair, route_tags, context)

    def _wrap_uncaptured(self, header_values: dict[bytes, bytes], receive: Receive, send: Send) -> UncapturedRequest:
        """Set the context only. A shadow is a shadow even if capturing is disabled or the headers are invalid."""
        role: Role = ROLE_BY_HEADER.get(header_values.get(ROLE_HEADER, b"live"), "shadow")
        pair = header_values[PAIR_HEADER].decode("latin-1")
        context = RequestContext(
            VERSION_BY_HEADER.get(header_values.get(VERSION_HEADER)), role, pair, self._release, None, perf_counter_ns()
        )
        context.cleanups = [] if context.is_shadow else None
        CURRENT_CONTEXT.set(context)
        return UncapturedRequest(context, receive, send)

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
