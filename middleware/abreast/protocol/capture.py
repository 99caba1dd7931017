"""What one version did with one request: the contract between services and sidecar, format 1.

A capture travels as one blob: a JSON object on one line, a newline, then the held bytes of the request's body and
of the answer's body. Services write it and the sidecar reads it, both with this module.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder

from abreast.errors import CaptureError

FORMAT_VERSION = 1
DIGEST_BYTES = 16  # bytes

Version = Literal["old", "new"]
Role = Literal["live", "shadow", "baseline"]
SpanRow = tuple[str, str, int, int, str]  # kind, name, µs since the arrival, µs taken, note
Headers = tuple[tuple[str, str], ...]  # latin-1 text, in order, duplicates kept, names in lower case

VERSIONS = ("old", "new")
ROLES = ("live", "shadow", "baseline")


class Body(Struct, frozen=True, gc=False):
    """The first `len(held)` bytes of a body of `length` bytes.

    `digest` (hex) is of the whole body, and is there whenever bytes are missing; a body that was not captured at all
    has a digest too.
    """

    content: bytes = b""
    length: int = 0
    digest: str = ""

    @property
    def is_complete(self) -> bool:
        return len(self.content) == self.length

    def fingerprint(self) -> str:
        """The digest of the whole body, also where it is held."""
        return self.digest or digest(self.content)


EMPTY_BODY = Body()


class Request(Struct, frozen=True, gc=False):
    method: str
    path: str  # raw, as sent, percent-encoding kept
    query: str = ""  # raw, without the question mark
    route: str = ""  # template such as /products/{id}; empty when the framework tells none
    headers: Headers = ()  # only chosen ones; secrets as keyed hashes
    body: Body = EMPTY_BODY


class Answer(Struct, frozen=True, gc=False):
    """`status` is 0 when the app never started an answer."""

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
    expected_captures: int = 2  # copies of the request that Envoy sent, this one included
    release: str = ""
    started_at: float = 0.0  # seconds since the epoch, the service's clock
    first_byte_us: int | None = None  # µs from the request's arrival to the answer's start
    total_us: int = 0  # µs from the request's arrival to the answer's end
    client_left: bool = False
    complete: bool = True  # the answer was sent to its end
    exception: str = ""  # class name of the exception that left the app
    effects: tuple[dict[str, Any], ...] = ()  # as abreast.effect_log writes them
    effects_dropped: int = 0  # more than may be recorded
    spans: tuple[SpanRow, ...] = ()
    cache: tuple[int, int] | None = None  # hits and misses; None where no cache was asked
    invalid_reason: str = ""  # why it says nothing of the code; only of copies
    truncated_by_deadline: bool = (
        False  # not complete yet: only what had come of a long answer when a pair had to be made
    )

    @property
    def slot(self) -> str:
        """Names this capture within its pair: a batch that is sent twice changes nothing."""
        return format_slot(self.version, self.role, self.attempt)


def format_slot(version: Version, role: Role, attempt: int) -> str:
    return f"{version}:{role}:{attempt}"


def digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).hexdigest()


BodyMetadata = tuple[int, int, str]  # bytes held, bytes in all, digest


class RequestHead(Struct, gc=False):
    """These heads are the line of JSON."""

    method: str
    path: str
    query: str
    route: str
    headers: Headers
    body: BodyMetadata


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


class _FormatProbe(Struct):
    v: Any = None


_encoder = Encoder()
_head_decoder = Decoder(CaptureHead)
_format_decoder = Decoder(_FormatProbe)


def encode(capture: Capture) -> bytes:
    request, answer = capture.request, capture.answer
    head = CaptureHead(
        FORMAT_VERSION,
        capture.pair,
        capture.service,
        capture.version,
        capture.role,
        capture.attempt,
        capture.expected_captures,
        capture.release,
        capture.started_at,
        capture.first_byte_us,
        capture.total_us,
        capture.client_left,
        capture.complete,
        capture.exception,
        capture.effects,
        RequestHead(
            request.method, request.path, request.query, request.route, request.headers, body_metadata(request.body)
        ),
        AnswerHead(answer.status, answer.headers, answer.trailers, body_metadata(answer.body)),
        capture.effects_dropped,
        capture.spans,
        capture.cache,
        capture.invalid_reason,
        capture.truncated_by_deadline,
    )
    return encode_parts(head, request.body.content, answer.body.content)


def encode_parts(head: CaptureHead, request_content: bytes, response_content: bytes) -> bytes:
    """A capture as it travels: what `encode` gives, for who has no Capture."""
    return b"".join((_encoder.encode(head), b"\n", request_content, response_content))


def body_metadata(body: Body) -> BodyMetadata:
    return len(body.content), body.length, body.digest


def decode(blob: bytes) -> Capture:
    """Raise CaptureError for what is no capture, damaged, or of a newer format."""
    line, newline, bodies = blob.partition(b"\n")
    try:
        head = _head_decoder.decode(line)
    except (DecodeError, UnicodeDecodeError) as error:  # of which ValidationError is one
        raise _make_unreadable_error(line, error) from error
    if head.v != FORMAT_VERSION or not newline:
        raise _make_unreadable_error(line, None)
    request_size, response_size = head.request.body[0], head.answer.body[0]
    if request_size < 0 or response_size < 0 or len(bodies) != request_size + response_size:
        raise CaptureError(
            f"a capture is damaged: {request_size + response_size} bytes of bodies are promised, {len(bodies)} are there"
        )
    return _build_capture(head, bodies[:request_size], bodies[request_size:])


def _make_unreadable_error(line: bytes, error: Exception | None) -> CaptureError:
    try:
        version = _format_decoder.decode(line).v
    except (DecodeError, UnicodeDecodeError) as problem:
        return CaptureError(f"a capture must begin with a line of JSON, an object: {problem}")
    if version != FORMAT_VERSION:
        return CaptureError(f"a capture of format {version!r} can't be read; this code reads format {FORMAT_VERSION}")
    if isinstance(error, ValidationError):
        return CaptureError(f"a capture lacks something or is damaged: {error}")
    return CaptureError("a capture must begin with a JSON object on a line of its own")


def _build_capture(head: CaptureHead, request_content: bytes, response_content: bytes) -> Capture:
    request, answer = head.request, head.answer
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
            Body(request_content, request.body[1], request.body[2]),
        ),
        Answer(answer.status, answer.headers, Body(response_content, answer.body[1], answer.body[2]), answer.trailers),
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
    )
