"""The capture of one request by one version: the contract between services and sidecar, format 1.

An encoded capture is a JSON object on one line, a newline, and the captured bytes of the request body and of the
response body. Services encode it and the sidecar decodes it, both with this module.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder
from msgspec.structs import replace

from abreast.errors import CaptureError

FORMAT_VERSION = 1
DIGEST_BYTES = 16

Version = Literal["old", "new"]
Role = Literal["live", "shadow", "baseline"]
SpanRow = tuple[str, str, int, int, str]  # kind, name, start in µs after the arrival, duration in µs, note
Headers = tuple[tuple[str, str], ...]  # latin-1 text, in order, with duplicates, names in lower case
BodyMetadata = tuple[int, int, str]  # captured bytes, length in bytes, digest

CHECKSUM_PREFIX = "envoy:"  # marks digests that Envoy's script makes, which only equal each other
PART_CHECKSUM_PREFIX = "envoy:part:"  # marks those that do not cover the whole body
MEASURED_FIELDS = ("first_byte_us", "total_us", "wait_us", "in_flight", "by_envoy")
HASH_PREFIX = "hmac:"  # marks the keyed hashes that replace secrets: hmac:KEY_ID:HASH


class Body(Struct, frozen=True, gc=False):
    """The first `len(content)` bytes of a body of `length` bytes.

    `digest` is the hex digest of the whole body, or a checksum with CHECKSUM_PREFIX. It is set if bytes are missing, and
    empty otherwise.
    """

    content: bytes = b""
    length: int = 0
    digest: str = ""

    @property
    def is_complete(self) -> bool:
        return len(self.content) == self.length

    @property
    def has_checksum(self) -> bool:
        return self.digest.startswith(CHECKSUM_PREFIX)

    @property
    def has_part_checksum(self) -> bool:
        return self.digest.startswith(PART_CHECKSUM_PREFIX)

    def fingerprint(self) -> str:
        """Return the digest of the whole body; compute it if the body is complete."""
        return self.digest or digest(self.content)


EMPTY_BODY = Body()


class Request(Struct, frozen=True, gc=False):
    method: str
    path: str  # as sent, with percent-encoding
    query: str = ""  # as sent, without the question mark
    route: str = ""  # template such as /products/{id}; empty if the framework has none
    headers: Headers = ()  # the configured ones; secrets as keyed hashes
    body: Body = EMPTY_BODY
    other_headers: tuple[str, ...] = ()  # names of headers whose values are not captured

    @property
    def target(self) -> str:
        """Path and query, as sent."""
        return f"{self.path}?{self.query}" if self.query else self.path


class Answer(Struct, frozen=True, gc=False):
    """The response of the app. `status` is 0 if the app never started one."""

    status: int
    headers: Headers = ()
    body: Body = EMPTY_BODY
    trailers: Headers = ()


class Capture(Struct, frozen=True, gc=False):
    pair: str
    service: str
    version: Version
    role: Role
    request: Request
    answer: Answer
    attempt: int = 1
    expected_captures: int = 2  # captures of the pair, including this one
    release: str = ""
    started_at: float = 0.0  # seconds since the epoch, by the clock of the service
    first_byte_us: int | None = None  # µs from the arrival of the request to the start of the response
    total_us: int = 0  # µs from the arrival of the request to the end of the response
    client_left: bool = False
    complete: bool = True  # the whole response was sent
    exception: str = ""  # class name of the exception that left the app
    effects: tuple[dict[str, Any], ...] = ()  # see abreast.context.EffectRecord
    effects_dropped: int = 0  # effects above the limit
    spans: tuple[SpanRow, ...] = ()
    cache: tuple[int, int] | None = None  # hits and misses; None if no cache was used
    invalid_reason: str = ""  # why the capture of a copy says nothing about the code
    truncated_by_deadline: bool = False  # the pair had to be joined before the response ended
    wait_us: int | None = (
        None  # from Envoy to the app, by two clocks: from the user's request, or the start of the copy
    )
    in_flight: int | None = (
        None  # other requests at the arrival: in the process, or if Envoy captured it, see `by_envoy`
    )
    # Envoy captured it. Its times include the network, and in_flight are requests of one thread to the cluster of the role.
    by_envoy: bool = False
    redaction_key_id: str = ""  # the id in its hashes; the hashes of different keys can't be compared
    is_times: bool = False  # Envoy's times and load for a capture of the middleware, and no capture

    @property
    def slot(self) -> str:
        """The name of this capture in its pair. It makes sending a batch idempotent."""
        return format_slot(self.version, self.role, self.attempt)


def format_slot(version: Version, role: Role, attempt: int) -> str:
    return f"{version}:{role}:{attempt}"


def digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).hexdigest()


class RequestHead(Struct, gc=False):
    """The request in the JSON line of a capture."""

    method: str
    path: str
    query: str
    route: str
    headers: Headers
    body: BodyMetadata
    other_headers: tuple[str, ...] = ()


class AnswerHead(Struct, gc=False):
    status: int
    headers: Headers
    trailers: Headers
    body: BodyMetadata


class CaptureHead(Struct, gc=False, omit_defaults=True):
    v: int
    pair: str
    service: str
    version: Version
    role: Role
    attempt: int
    expected_captures: int
    release: str
    started_at: float
    first_byte_us: int | None
    total_us: int
    client_left: bool
    complete: bool
    exception: str
    effects: tuple[dict[str, Any], ...]
    request: RequestHead
    answer: AnswerHead
    effects_dropped: int = 0
    spans: tuple[SpanRow, ...] = ()
    cache: tuple[int, int] | None = None
    invalid_reason: str = ""
    truncated_by_deadline: bool = False
    wait_us: int | None = None
    in_flight: int | None = None
    by_envoy: bool = False
    redaction_key_id: str = ""
    is_times: bool = False


class _FormatProbe(Struct):
    v: Any = None


_encoder = Encoder()
_head_decoder = Decoder(CaptureHead)
_format_decoder = Decoder(_FormatProbe)
_VALUE_PATTERN = re.compile(r" '.*'(?= - at )", re.DOTALL)  # in the messages of msgspec


def encode_parts(head: CaptureHead, request_content: bytes, response_content: bytes) -> bytes:
    """Encode a capture from its JSON line and the captured bytes of its bodies."""
    return b"".join((_encoder.encode(head), b"\n", request_content, response_content))


def body_metadata(body: Body) -> BodyMetadata:
    return len(body.content), body.length, body.digest


def decode(blob: bytes) -> Capture:
    """Decode a capture. Raises CaptureError if it is damaged, no capture, or of another format.

    The message contains no captured values, so it may appear in logs.
    """
    line, newline, bodies = blob.partition(b"\n")
    try:
        head = _head_decoder.decode(line)
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:  # includes ValidationError
        raise _make_unreadable_error(line, error) from error
    if head.v != FORMAT_VERSION or not newline:
        raise _make_unreadable_error(line, None)
    request_size, response_size = head.request.body[0], head.answer.body[0]
    if request_size < 0 or response_size < 0 or len(bodies) != request_size + response_size:
        raise CaptureError(
            f"a capture is damaged: its bodies must have {request_size + response_size} bytes, got {len(bodies)}"
        )
    request, answer = head.request, head.answer
    if not request.path.startswith("/"):  # appended to an address, it could name another host
        raise CaptureError("a capture is damaged: its path must begin with /")
    return Capture(
        head.pair,
        head.service,
        head.version,
        head.role,
        Request(
            request.method,
            request.path,
            request.query,
            request.route,
            request.headers,
            Body(bodies[:request_size], request.body[1], request.body[2]),
            request.other_headers,
        ),
        Answer(
            answer.status, answer.headers, Body(bodies[request_size:], answer.body[1], answer.body[2]), answer.trailers
        ),
        head.attempt,
        head.expected_captures,
        head.release,
        head.started_at,
        head.first_byte_us,
        head.total_us,
        head.client_left,
        head.complete,
        head.exception,
        head.effects,
        head.effects_dropped,
        head.spans,
        head.cache,
        head.invalid_reason,
        head.truncated_by_deadline,
        head.wait_us,
        head.in_flight,
        head.by_envoy,
        head.redaction_key_id,
        head.is_times,
    )


def merge_times(captures: Sequence[Capture]) -> list[Capture]:
    """Return the captures of a pair without times, which replace those of the middleware if Envoy captured another one."""
    times = {capture.slot: capture for capture in captures if capture.is_times}
    if not times:
        return list(captures)
    merged = [capture for capture in captures if not capture.is_times]
    if not any(capture.by_envoy for capture in merged):
        return merged
    for index, capture in enumerate(merged):
        measured = times.get(capture.slot)
        if measured is not None and not capture.by_envoy:
            merged[index] = replace(capture, **{name: getattr(measured, name) for name in MEASURED_FIELDS})
    return merged


def _make_unreadable_error(line: bytes, error: Exception | None) -> CaptureError:
    try:
        version = _format_decoder.decode(line).v
    except (DecodeError, UnicodeDecodeError) as problem:
        return CaptureError(f"a capture must start with a line of JSON, an object: {problem}")
    except RecursionError:
        return CaptureError("a capture is nested too deeply")
    if version != FORMAT_VERSION:
        format_text = f"format {version}" if type(version) is int else f"a format of type {type(version).__name__}"
        return CaptureError(
            f"a capture must have format {FORMAT_VERSION}, got {format_text}; upgrade the sidecar before the services"
        )
    if isinstance(error, ValidationError):
        return CaptureError(f"a capture is damaged or lacks a field: {_VALUE_PATTERN.sub('', str(error))}")
    return CaptureError("a capture must start with a JSON object on a separate line")
