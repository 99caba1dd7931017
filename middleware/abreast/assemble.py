"""From what was noted in passing to a capture, written as it travels. Runs in the background, for every capture: it makes
as few objects as it can.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from time import perf_counter_ns
from urllib.parse import quote

from abreast.body import short_body
from abreast.capture import FORMAT, AnswerHead, Body, Head, Headers, RequestHead, body_head, slot, written
from abreast.join import Row
from abreast.recorder import RawHeaders, Recorder, Scope
from abreast.redact import Redactor
from abreast.settings import Settings

NONE = Body()
NONE_HEAD = body_head(NONE)
KEPT = ("method", "path", "raw_path", "query_string", "headers")  # of the scope
ATTEMPT = b"x-envoy-attempt-count"
MOST_DIGITS = 6  # of an attempt
PATH_SAFE = "/:@!$&'()*+,;=~-._"


def settle(recorder: Recorder) -> None:
    """Let go of the request's scope, which holds whatever the app put there, but for what a capture needs."""
    scope = recorder.scope
    recorder.scope = {name: scope[name] for name in KEPT if name in scope}


class Assembler:
    def __init__(self, settings: Settings, redactor: Redactor) -> None:
        self._service = settings.service
        self._release = settings.release
        self._limit = settings.body_limit
        self._chosen = {name.encode("ascii"): name for name in settings.request_headers}
        self._redactor = redactor

    def row(self, recorder: Recorder) -> Row:
        """A capture whose secrets are hashed."""
        version, role, arms, *_ = recorder.marks
        now = recorder.now
        began, hops = now.began, now.hops
        attempt = _attempt(recorder.scope["headers"])
        pair = recorder.pair.decode("ascii")
        effects, effects_dropped = now.close(self._redactor.payload)
        asked = NONE if recorder.asked is None else recorder.asked.body()
        answered = self._answered(recorder)
        head = Head(
            FORMAT,
            pair,
            self._service,
            version,
            role,
            attempt,
            arms,
            self._release,
            time.time() - (perf_counter_ns() - began) / 1e9,
            (recorder.first_byte - began) // 1000 if recorder.first_byte else None,
            (recorder.finished - began) // 1000,
            recorder.client_left,
            recorder.complete,
            recorder.raised,
            effects,
            self._request(recorder.scope, recorder.route, asked),
            AnswerHead(
                recorder.status,
                self._headers(recorder.headers),
                self._headers(recorder.trailers) if recorder.trailers else (),
                body_head(answered),
            ),
            effects_dropped,
            tuple(hops.kept) if hops else (),
            (hops.hits, hops.misses) if hops and hops.hits + hops.misses else None,
            now.disturbed,
            recorder.going_on,
        )
        return pair, slot(version, role, attempt), arms, written(head, asked.held, answered.held)

    def _request(self, scope: Scope, route: str, body: Body) -> RequestHead:
        chosen = self._chosen
        headers = tuple(
            [(chosen[name], value.decode("latin-1")) for name, value in scope["headers"] if name in chosen]
        )
        return RequestHead(
            scope["method"],
            _path(scope),
            scope.get("query_string", b"").decode("latin-1"),
            route,
            self._redactor.headers(headers),
            NONE_HEAD if body is NONE else body_head(body),
        )

    def _headers(self, rows: Iterable[tuple[bytes, bytes]]) -> Headers:
        return self._redactor.headers(tuple([(_name(name), value.decode("latin-1")) for name, value in rows]))

    def _answered(self, recorder: Recorder) -> Body:
        """As the client got it: with HEAD, servers send no body, whatever the app gave them."""
        if recorder.scope["method"] == "HEAD":
            return NONE
        if recorder.answer is None:
            return short_body(recorder.only, self._limit)
        return recorder.answer.body()


def _path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    if raw:
        path: str = raw.decode("latin-1").partition("?")[0]
        return path
    return quote(scope["path"], safe=PATH_SAFE)


@lru_cache(maxsize=1024)
def _name(name: bytes) -> str:
    return name.decode("latin-1").lower()


def _attempt(headers: RawHeaders) -> int:
    """Envoy counts a request's attempts; a retry carries the same pair."""
    for name, value in headers:
        if name == ATTEMPT and value.isdigit() and len(value) <= MOST_DIGITS:
            return int(value)
    return 1
