"""The ASGI middleware: adds next to nothing to a request that is not sampled, and about 5 µs to one that is."""

from __future__ import annotations

import logging
import os
import string
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Unpack, get_args

from abreast.backlog import Backlog
from abreast.bystander import Bystander
from abreast.capture import Role, Version
from abreast.context import CURRENT, OUTSIDE, Current, maker
from abreast.ending import end
from abreast.errors import SettingError
from abreast.loops import Loops
from abreast.recorder import PAIR, Marks, Message, Receive, Recorder, Scope, Send
from abreast.rescue import Rescue
from abreast.route import Routes
from abreast.settings import Options, Settings

App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("abreast")

VERSION = b"x-abreast-version"
ROLE = b"x-abreast-role"
ARMS = b"x-abreast-arms"
SEEN = "abreast.current"  # in the scope: an outer middleware records this request already
VERSIONS: dict[bytes | None, Version] = {each.encode(): each for each in get_args(Version)}
ROLES: dict[bytes, Role] = {each.encode(): each for each in get_args(Role)}
TAIL = 8  # headers at the end, where ours are as a rule
ID = (string.digits + string.ascii_letters + "-").encode()  # what a pair id may hold
ID_LENGTH = 64


class ParallelRunMiddleware:
    """Records what the app answers to requests that Envoy sampled, and sends it to Redis in the background.

    Settings are the fields of abreast.settings.Settings; each one that is not passed is read from ABREAST_<NAME>.
    One that can't be used switches the middleware off, with an error in the log. It is not raised: Starlette makes its
    middleware at the first request, so a slip in a variable would become a 500 for every user. `problem` holds it.
    """

    def __init__(self, app: App, **settings: Unpack[Options]) -> None:
        self.app = app
        self.problem = ""
        self.settings = self._read(settings)
        self.rescue = Rescue()
        self.backlog = Backlog(self.settings)
        self._loops = Loops(self.settings, self.backlog, Routes(app), self.rescue)
        self._enabled = self.settings.enabled
        self._release = self.settings.release
        self._marks = self._all_marks()

    def _read(self, settings: Options) -> Settings:
        try:
            return Settings.read(os.environ, settings)
        except SettingError as error:
            self.problem = str(error)
            logger.error("the middleware is off, requests pass untouched: %s", error)  # noqa: TRY400  # it says all
            return Settings(enabled=False)

    def _all_marks(self) -> dict[tuple[bytes | None, ...], Marks]:
        release = self.settings.release.encode("ascii")
        tags = [(b"x-abreast-release", release)] if release else []
        return {
            (version.encode(), role.encode(), b"%d" % arms): (
                version,
                role,
                arms,
                [(VERSION, version.encode()), *tags],
                maker(version, role, self._release, self.backlog),
            )
            for version in get_args(Version)
            for role in get_args(Role)
            for arms in (2, 3)
        }

    async def __call__(  # noqa: C901  # one function: it is in every request
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        kind = scope["type"]
        if kind == "http" or kind == "websocket":  # noqa: PLR1714  # faster
            before, recorder, stray = CURRENT.get(), None, False
            try:
                headers = scope["headers"]
                if headers.__class__ is not list:
                    headers = scope["headers"] = list(headers)  # the app must be able to read them too
                for name, _ in reversed(headers):  # Envoy adds to the end
                    if name == PAIR:
                        recorder = self._recorder(scope, receive, send)
                        break
                else:
                    stray = before.answered  # a server took another request's context along to this one
            except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
                self.rescue("request", error)
            if recorder is not None:
                try:
                    await self.app(scope, recorder.receive, recorder.send)
                except BaseException as error:  # the context stays, for handlers further out
                    recorder.left(type(error).__name__)
                    end(recorder.now)
                    raise
                recorder.returned = True
                if not recorder.finished:
                    recorder.left("")
                if recorder.now.shadow:
                    end(recorder.now)
                CURRENT.set(before)
                return
            if stray:
                CURRENT.set(OUTSIDE)
                await self.app(scope, receive, send)
                CURRENT.set(before)
                return
        elif kind == "lifespan" and self._enabled:
            await self._lifespan(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _recorder(self, scope: Scope, receive: Receive, send: Send) -> Recorder | Bystander | None:
        """What watches a marked request; None where an outer middleware does. Tells the code which role it has."""
        if SEEN in scope:
            CURRENT.set(scope[SEEN])  # something in between may have begun a new context
            return None
        headers = scope["headers"]
        try:
            found = dict(headers[-TAIL:])
            pair = found[PAIR]
            marks = self._marks.get((found[VERSION], found[ROLE], found[ARMS]))
        except KeyError:
            found = dict(headers)
            pair = found[PAIR]
            marks = self._marks.get((found.get(VERSION), found.get(ROLE), found.get(ARMS)))
        if (
            marks is None
            or pair.translate(None, ID)
            or not 0 < len(pair) <= ID_LENGTH
            or not self._enabled
            or scope["type"] != "http"
        ):
            return self._bystander(found, receive, send)
        now = marks[4](pair.decode(), perf_counter_ns())
        if now.shadow:
            now.ends = []
        CURRENT.set(now)
        scope[SEEN] = now
        return Recorder(self._loops, scope, receive, send, pair, marks, now)

    def _bystander(self, found: dict[bytes, bytes], receive: Receive, send: Send) -> Bystander:
        """For what is not captured: a shadow is one also where capturing is off, or the marks are not understood."""
        role: Role = ROLES.get(found.get(ROLE, b"live"), "shadow")
        pair = found[PAIR].decode("latin-1")
        now = Current(VERSIONS.get(found.get(VERSION)), role, pair, self._release, None, perf_counter_ns())
        now.ends = [] if now.shadow else None
        CURRENT.set(now)
        return Bystander(now, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Connect at the start, and send what waits before the server is told that the app has stopped."""

        async def flushing(message: Message) -> None:
            if message["type"] in {"lifespan.shutdown.complete", "lifespan.shutdown.failed"}:
                await self.aclose()
            await send(message)

        try:
            self._loops.start()
        except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
            self.rescue("start", error)
        await self.app(scope, receive, flushing)

    async def aclose(self) -> None:
        """Send what waits, for `flush_timeout` seconds at most, and close the connection to Redis. Never raises.

        Only needed where neither the server's lifespan nor the end of the event loop does it.
        """
        await self._loops.aclose()
