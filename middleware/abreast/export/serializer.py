"""The encoding of a recorder as a capture, with secrets redacted.

The code runs for every capture, so it creates as few objects as possible.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from urllib.parse import quote

from abreast.export.redaction import Redactor
from abreast.protocol.capture import (
    FORMAT_VERSION,
    AnswerHead,
    Body,
    CaptureHead,
    Headers,
    RequestHead,
    body_metadata,
    encode_parts,
    format_slot,
)
from abreast.protocol.join import CaptureRow
from abreast.recorder import RawHeaders, RequestRecorder, Scope, small_body
from abreast.settings import RedactionKeys, Settings

NO_BODY = Body()
SCOPE_KEYS = ("method", "path", "raw_path", "query_string", "headers")  # the ones that a capture needs
ATTEMPT_HEADER = b"x-envoy-attempt-count"
MAX_ATTEMPT_DIGITS = 6
SENT_MS_DIGITS = 13  # until the year 2286
TIMED_MARK = b"t"  # after the time: Envoy also measures this request
# Headers of Envoy, of Abreast and of one connection say nothing about the user's request.
IGNORED_HEADERS = re.compile(
    "x-abreast-.*|x-envoy-.*|connection|content-length|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade"
)
SAFE_PATH_CHARS = "/:@!$&'()*+,;=~-._"


def trim_scope(recorder: RequestRecorder) -> None:
    """Keep only the parts of the scope that a capture needs. The scope may hold large objects of the app."""
    scope = recorder.scope
    recorder.scope = {name: scope[name] for name in SCOPE_KEYS if name in scope}


class RotatingRedactor:
    """The redactors of a key and of the next one. `refresh` reads a rotation from the file of the key."""

    REFRESH_INTERVAL_S = 5.0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._file = Path(settings.redact_key_file) if settings.redact_key_file else None
        self._refresh_at = 0.0  # monotonic
        self._redactors: dict[str, Redactor] = {}
        self._apply(settings.redaction_keys)

    def at(self, time_s: float) -> Redactor:
        """Return the redactor of a request that began at this Unix time."""
        current, following, start = self._choice
        return current if time_s < start else following

    @property
    def is_stale(self) -> bool:
        return self._file is not None and time.monotonic() >= self._refresh_at

    def refresh(self) -> None:
        """Read the keys again if they are stale. Raise OSError or ValueError, and keep the former keys. Blocks."""
        if self._file is not None and self.is_stale:
            self._refresh_at = time.monotonic() + self.REFRESH_INTERVAL_S
            self._apply(RedactionKeys.parse(self._file.read_text(encoding="utf-8")))

    def _apply(self, keys: RedactionKeys) -> None:
        names = (keys.key, keys.next_key) if keys.next_key else (keys.key,)
        settings = self._settings
        self._redactors = {
            key: self._redactors.get(key) or Redactor(key, settings.secret_headers, settings.redact_allow)
            for key in names
        }
        self._choice = self._redactors[names[0]], self._redactors[names[-1]], keys.next_from


class CaptureSerializer:
    def __init__(self, settings: Settings, redactor: Redactor | RotatingRedactor) -> None:
        self._service = settings.service
        self._release = settings.release
        self._body_limit = settings.body_limit
        self._header_names = {name.encode("ascii"): name for name in settings.request_headers}
        self._redactor = redactor

    def serialize(self, recorder: RequestRecorder) -> CaptureRow:
        """Encode a capture, with secrets hashed."""
        version, role, expected_captures, *_ = recorder.route_tags
        context, scope = recorder.context, recorder.scope
        started_ns, spans = context.started_ns, context.spans
        attempt = _read_attempt(scope["headers"])
        started_at = time.time() - (perf_counter_ns() - started_ns) / 1e9
        sent_ms, _, mark = recorder.sent_ms.partition(b" ")
        pair = recorder.pair.decode("ascii")
        method, path, redactor = scope["method"], _get_raw_path(scope), self._redactor.at(started_at)
        allowed = redactor.allowed_names(method, recorder.route or path)
        effects, effects_dropped = context.close_effect_log(lambda payload: redactor.redact_payload(payload, allowed))
        if effects:
            effects = tuple([_redact_effect(redactor, effect) for effect in effects])
        request_body = NO_BODY if recorder.request_body is None else recorder.request_body.to_body()
        if method == "HEAD":  # servers send no body
            response_body = NO_BODY
        elif recorder.response_body is None:
            response_body = small_body(recorder.single_chunk, self._body_limit)
        else:
            response_body = recorder.response_body.to_body()
        response_headers = _decode_headers(recorder.headers)
        if request_body.length:
            request_body = _redact_body(redactor, request_body, _decode_headers(scope["headers"]), allowed)
        original_length = response_body.length
        if original_length:
            response_body = _redact_body(redactor, response_body, response_headers, allowed)
        response_headers = redactor.redact_headers(response_headers, allowed)
        if response_body.length != original_length:  # otherwise the body would look broken off
            length_header = ("content-length", str(original_length))
            response_headers = tuple(
                [(row[0], str(response_body.length)) if row == length_header else row for row in response_headers]
            )
        head = CaptureHead(
            FORMAT_VERSION,
            pair,
            self._service,
            version,
            role,
            attempt,
            expected_captures,
            self._release,
            started_at,
            (recorder.first_byte_ns - started_ns) // 1000 if recorder.first_byte_ns else None,
            (recorder.finished_ns - started_ns) // 1000,
            recorder.client_left,
            recorder.is_complete,
            recorder.exception,
            effects,
            RequestHead(
                method,
                redactor.redact_path(path),
                redactor.redact_query(scope.get("query_string", b"").decode("latin-1"), allowed),
                recorder.route,
                redactor.redact_headers(self._select_request_headers(scope["headers"]), allowed),
                body_metadata(request_body),
                self._list_other_headers(scope["headers"]),
            ),
            AnswerHead(
                recorder.status,
                response_headers,
                redactor.redact_headers(_decode_headers(recorder.trailers), allowed) if recorder.trailers else (),
                body_metadata(response_body),
            ),
            effects_dropped,
            tuple([(row[0], redactor.redact_text(row[1]), *row[2:]) for row in spans.rows]) if spans else (),
            (spans.hits, spans.misses) if spans and spans.hits + spans.misses else None,
            context.invalid_reason,
            recorder.truncated_by_deadline,
            round(started_at * 1e6) - int(sent_ms) * 1000
            if len(sent_ms) == SENT_MS_DIGITS and sent_ms.isdigit()
            else None,
            recorder.in_flight,
            recorder.by_envoy,
            redactor.key_id,
            recorder.is_times,
        )
        slot = format_slot(version, role, attempt)
        if recorder.is_times:
            slot += "="
        elif mark == TIMED_MARK and attempt == 1 and not recorder.by_envoy:
            slot += "+"
        return (pair, slot, expected_captures, encode_parts(head, request_body.content, response_body.content))

    def _select_request_headers(self, rows: RawHeaders) -> Headers:
        """Return the headers that the settings name."""
        header_names = self._header_names
        return tuple([(header_names[name], value.decode("latin-1")) for name, value in rows if name in header_names])

    def _list_other_headers(self, rows: RawHeaders) -> tuple[str, ...]:
        """Return the names of the headers that the settings don't name."""
        header_names = self._header_names
        names = [_decode_other_name(name) for name, _ in rows if name not in header_names]
        return tuple(dict.fromkeys(filter(None, names)))


def _redact_effect(redactor: Redactor, effect: dict[str, Any]) -> dict[str, Any]:
    for name, redact in (("key", redactor.redact_text), ("digest", redactor.hash)):
        if name in effect:
            effect[name] = redact(effect[name])
    return effect


def _redact_body(redactor: Redactor, body: Body, headers: Headers, allowed: frozenset[str]) -> Body:
    values = dict(headers)
    return redactor.redact_body(body, values.get("content-type", ""), values.get("content-encoding", ""), allowed)


def _decode_headers(rows: RawHeaders) -> Headers:
    return tuple([(_decode_header_name(name), value.decode("latin-1")) for name, value in rows])


def _get_raw_path(scope: Scope) -> str:
    if raw_path := scope.get("raw_path"):
        path: str = raw_path.decode("latin-1").partition("?")[0]
        return path
    return quote(scope["path"], safe=SAFE_PATH_CHARS)


@lru_cache(maxsize=1024)
def _decode_header_name(name: bytes) -> str:
    return name.decode("latin-1").lower()


@lru_cache(maxsize=1024)
def _decode_other_name(name: bytes) -> str:
    """Return the name, or empty text for a header that is not of the user's request."""
    text = _decode_header_name(name)
    return "" if IGNORED_HEADERS.fullmatch(text) else text


def _read_attempt(headers: RawHeaders) -> int:
    """Return the attempt number that Envoy sets. Retries have the same pair id."""
    for name, value in headers:
        if name == ATTEMPT_HEADER and value.isdigit() and len(value) <= MAX_ATTEMPT_DIGITS:
            return int(value)
    return 1
