"""The encoding of a recorder as a capture. It runs for every capture, so it creates as few objects as possible."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from time import perf_counter_ns
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
from abreast.settings import Settings

NO_BODY = Body()
NO_BODY_METADATA = body_metadata(NO_BODY)
SCOPE_KEYS = ("method", "path", "raw_path", "query_string", "headers")  # the ones that a capture needs
ATTEMPT_HEADER = b"x-envoy-attempt-count"
MAX_ATTEMPT_DIGITS = 6
SAFE_PATH_CHARS = "/:@!$&'()*+,;=~-._"


def trim_scope(recorder: RequestRecorder) -> None:
    """Keep only the parts of the scope that a capture needs. The scope may hold large objects of the app."""
    scope = recorder.scope
    recorder.scope = {name: scope[name] for name in SCOPE_KEYS if name in scope}


class CaptureSerializer:
    def __init__(self, settings: Settings, redactor: Redactor) -> None:
        self._service = settings.service
        self._release = settings.release
        self._body_limit = settings.body_limit
        self._header_names = {name.encode("ascii"): name for name in settings.request_headers}
        self._redactor = redactor

    def serialize(self, recorder: RequestRecorder) -> CaptureRow:
        """Encode a capture, with secrets hashed."""
        version, role, expected_captures, *_ = recorder.route_tags
        context = recorder.context
        started_ns, spans = context.started_ns, context.spans
        attempt = _read_attempt(recorder.scope["headers"])
        pair = recorder.pair.decode("ascii")
        effects, effects_dropped = context.close_effect_log(self._redactor.redact_payload)
        request_body = NO_BODY if recorder.request_body is None else recorder.request_body.to_body()
        response_body = self._get_response_body(recorder)
        head = CaptureHead(
            FORMAT_VERSION,
            pair,
            self._service,
            version,
            role,
            attempt,
            expected_captures,
            self._release,
            time.time() - (perf_counter_ns() - started_ns) / 1e9,
            (recorder.first_byte_ns - started_ns) // 1000 if recorder.first_byte_ns else None,
            (recorder.finished_ns - started_ns) // 1000,
            recorder.client_left,
            recorder.is_complete,
            recorder.exception,
            effects,
            self._build_request_head(recorder.scope, recorder.route, request_body),
            AnswerHead(
                recorder.status,
                self._redact_headers(recorder.headers),
                self._redact_headers(recorder.trailers) if recorder.trailers else (),
                body_metadata(response_body),
            ),
            effects_dropped,
            tuple(spans.rows) if spans else (),
            (spans.hits, spans.misses) if spans and spans.hits + spans.misses else None,
            context.invalid_reason,
            recorder.truncated_by_deadline,
        )
        return (
            pair,
            format_slot(version, role, attempt),
            expected_captures,
            encode_parts(head, request_body.content, response_body.content),
        )

    def _build_request_head(self, scope: Scope, route: str, body: Body) -> RequestHead:
        header_names = self._header_names
        headers = tuple(
            [(header_names[name], value.decode("latin-1")) for name, value in scope["headers"] if name in header_names]
        )
        return RequestHead(
            scope["method"],
            _get_raw_path(scope),
            scope.get("query_string", b"").decode("latin-1"),
            route,
            self._redactor.redact_headers(headers),
            NO_BODY_METADATA if body is NO_BODY else body_metadata(body),
        )

    def _redact_headers(self, rows: Iterable[tuple[bytes, bytes]]) -> Headers:
        return self._redactor.redact_headers(
            tuple([(_decode_header_name(name), value.decode("latin-1")) for name, value in rows])
        )

    def _get_response_body(self, recorder: RequestRecorder) -> Body:
        """Return the body that the client received. For HEAD, servers send none."""
        if recorder.scope["method"] == "HEAD":
            return NO_BODY
        if recorder.response_body is None:
            return small_body(recorder.single_chunk, self._body_limit)
        return recorder.response_body.to_body()


def _get_raw_path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    if raw:
        path: str = raw.decode("latin-1").partition("?")[0]
        return path
    return quote(scope["path"], safe=SAFE_PATH_CHARS)


@lru_cache(maxsize=1024)
def _decode_header_name(name: bytes) -> str:
    return name.decode("latin-1").lower()


def _read_attempt(headers: RawHeaders) -> int:
    """Return the attempt number that Envoy sets. Retries have the same pair id."""
    for name, value in headers:
        if name == ATTEMPT_HEADER and value.isdigit() and len(value) <= MAX_ATTEMPT_DIGITS:
            return int(value)
    return 1
