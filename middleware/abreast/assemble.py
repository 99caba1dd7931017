"""From what was noted in passing to a capture. Runs in the background."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from time import perf_counter_ns
from urllib.parse import quote

from abreast.body import short_body
from abreast.capture import Answer, Body, Capture, Headers, Request
from abreast.recorder import Recorder, Scope
from abreast.redact import Redactor
from abreast.settings import Settings

NONE = Body()
KEPT = ("method", "path", "raw_path", "query_string", "headers")  # of the scope
ATTEMPT = b"x-envoy-attempt-count"
MOST_DIGITS = 6  # of an attempt
PATH_SAFE = "/:@!$&'()*+,;=~-._"


def settle(recorder: Recorder, route: str) -> None:
    """Let go of the request's scope, which holds whatever the app put there, but for what a capture needs."""
    scope = recorder.scope
    recorder.scope = {name: scope[name] for name in KEPT if name in scope}
    recorder.route = route
    recorder.started = time.time() - (perf_counter_ns() - recorder.now.began) / 1e9


def assemble(recorder: Recorder, settings: Settings, chosen: frozenset[bytes], redactor: Redactor) -> Capture:
    """A capture whose secrets are hashed, of what was settled."""
    version, role, arms, *_ = recorder.marks
    began, scope, hops = recorder.now.began, recorder.scope, recorder.now.hops
    effects, effects_dropped = recorder.now.close(redactor.payload)
    return Capture(
        pair=recorder.pair.decode("ascii"),
        service=settings.service,
        version=version,
        role=role,
        attempt=_attempt(scope),
        arms=arms,
        release=settings.release,
        started=recorder.started,
        first_byte_us=(recorder.first_byte - began) // 1000 if recorder.first_byte else None,
        total_us=(recorder.finished - began) // 1000,
        client_left=recorder.client_left,
        complete=recorder.complete,
        raised=recorder.raised,
        effects=effects,
        effects_dropped=effects_dropped,
        hops=tuple(hops.kept) if hops else (),
        disturbed=recorder.now.disturbed,
        cache=(hops.hits, hops.misses) if hops and hops.hits + hops.misses else None,
        request=Request(
            method=scope["method"],
            path=_path(scope),
            query=scope.get("query_string", b"").decode("latin-1"),
            route=recorder.route,
            headers=redactor.headers(_headers([row for row in scope["headers"] if row[0] in chosen])),
            body=NONE if recorder.asked is None else recorder.asked.body(),
        ),
        answer=Answer(
            status=recorder.status,
            headers=redactor.headers(_headers(recorder.headers)),
            body=_answered(recorder, settings.body_limit),
            trailers=redactor.headers(_headers(recorder.trailers)) if recorder.trailers else (),
        ),
    )


def _path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    if raw:
        path: str = raw.decode("latin-1").partition("?")[0]
        return path
    return quote(scope["path"], safe=PATH_SAFE)


def _headers(rows: Iterable[tuple[bytes, bytes]]) -> Headers:
    return tuple([(_name(name), value.decode("latin-1")) for name, value in rows])


@lru_cache(maxsize=1024)
def _name(name: bytes) -> str:
    return name.decode("latin-1").lower()


def _answered(recorder: Recorder, limit: int) -> Body:
    """As the client got it: with HEAD, servers send no body, whatever the app gave them."""
    if recorder.scope["method"] == "HEAD":
        return NONE
    return short_body(recorder.only, limit) if recorder.answer is None else recorder.answer.body()


def _attempt(scope: Scope) -> int:
    """Envoy counts a request's attempts; a retry carries the same pair."""
    for name, value in scope["headers"]:
        if name == ATTEMPT and value.isdigit() and len(value) <= MOST_DIGITS:
            return int(value)
    return 1
