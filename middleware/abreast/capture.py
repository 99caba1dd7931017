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

FORMAT = 1
DIGEST_SIZE = 16  # bytes

Version = Literal["old", "new"]
Role = Literal["live", "shadow", "baseline"]
HopRow = tuple[str, str, int, int, str]  # kind, name, µs since the arrival, µs taken, note
Headers = tuple[tuple[str, str], ...]  # latin-1 text, in order, duplicates kept, names in lower case

VERSIONS = ("old", "new")
ROLES = ("live", "shadow", "baseline")


class Body(Struct, frozen=True, gc=False):
    """The first `len(held)` bytes of a body of `length` bytes.

    `digest` (hex) is of the whole body, and is there whenever bytes are missing; a body that was not captured at all
    has a digest too.
    """

    held: bytes = b""
    length: int = 0
    digest: str = ""

    @property
    def whole(self) -> bool:
        return len(self.held) == self.length

    def fingerprint(self) -> str:
        """The digest of the whole body, also where it is held."""
        return self.digest or digest(self.held)


NOTHING = Body()


class Request(Struct, frozen=True, gc=False):
    method: str
    path: str  # raw, as sent, percent-encoding kept
    query: str = ""  # raw, without the question mark
    route: str = ""  # template such as /products/{id}; empty when the framework tells none
    headers: Headers = ()  # only chosen ones; secrets as keyed hashes
    body: Body = NOTHING


class Answer(Struct, frozen=True, gc=False):
    """`status` is 0 when the app never started an answer."""

    status: int
    headers: Headers = ()
    body: Body = NOTHING
    trailers: Headers = ()


class Capture(Struct, frozen=True, gc=False):
    pair: str
    service: str
    version: Version
    role: Role
    request: Request
    answer: Answer
    attempt: int = 1
    arms: int = 2  # copies of the request that Envoy sent, this one included
    release: str = ""
    started: float = 0.0  # seconds since the epoch, the service's clock
    first_byte_us: int | None = None  # µs from the request's arrival to the answer's start
    total_us: int = 0  # µs from the request's arrival to the answer's end
    client_left: bool = False
    complete: bool = True  # the answer was sent to its end
    raised: str = ""  # class name of the exception that left the app
    effects: tuple[dict[str, Any], ...] = ()  # as abreast.journal writes them
    effects_dropped: int = 0  # more than may be recorded
    hops: tuple[HopRow, ...] = ()
    cache: tuple[int, int] | None = None  # hits and misses; None where no cache was asked
    disturbed: str = ""  # why it says nothing of the code; only of copies
    going_on: bool = False  # not complete yet: only what had come of a long answer when a pair had to be made

    @property
    def slot(self) -> str:
        """Names this capture within its pair: a batch that is sent twice changes nothing."""
        return slot(self.version, self.role, self.attempt)


def slot(version: Version, role: Role, attempt: int) -> str:
    return f"{version}:{role}:{attempt}"


def digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=DIGEST_SIZE).hexdigest()


BodyHead = tuple[int, int, str]  # bytes held, bytes in all, digest


class RequestHead(Struct, gc=False):
    """These heads are the line of JSON."""

    method: str
    path: str
    query: str
    route: str
    headers: Headers
    body: BodyHead


class AnswerHead(Struct, gc=False):
    status: int
    headers: Headers
    trailers: Headers
    body: BodyHead


class Head(Struct, gc=False, omit_defaults=True):
    v: int
    pair: str
    service: str
    version: Version
    role: Role
    attempt: int
    arms: int
    release: str
    started: float
    first_byte_us: int | None
    total_us: int
    client_left: bool
    complete: bool
    raised: str
    effects: tuple[dict[str, Any], ...]
    request: RequestHead
    answer: AnswerHead
    effects_dropped: int = 0
    hops: tuple[HopRow, ...] = ()
    cache: tuple[int, int] | None = None
    disturbed: str = ""
    going_on: bool = False


class _Format(Struct):
    v: Any = None


_encoder = Encoder()
_heads = Decoder(Head)
_formats = Decoder(_Format)


def encode(capture: Capture) -> bytes:
    request, answer = capture.request, capture.answer
    head = Head(
        FORMAT,
        capture.pair,
        capture.service,
        capture.version,
        capture.role,
        capture.attempt,
        capture.arms,
        capture.release,
        capture.started,
        capture.first_byte_us,
        capture.total_us,
        capture.client_left,
        capture.complete,
        capture.raised,
        capture.effects,
        RequestHead(
            request.method,
            request.path,
            request.query,
            request.route,
            request.headers,
            body_head(request.body),
        ),
        AnswerHead(answer.status, answer.headers, answer.trailers, body_head(answer.body)),
        capture.effects_dropped,
        capture.hops,
        capture.cache,
        capture.disturbed,
        capture.going_on,
    )
    return written(head, request.body.held, answer.body.held)


def written(head: Head, asked: bytes, answered: bytes) -> bytes:
    """A capture as it travels: what `encode` gives, for who has no Capture."""
    return b"".join((_encoder.encode(head), b"\n", asked, answered))


def body_head(body: Body) -> BodyHead:
    return len(body.held), body.length, body.digest


def decode(blob: bytes) -> Capture:
    """Raise CaptureError for what is no capture, damaged, or of a newer format."""
    line, newline, bodies = blob.partition(b"\n")
    try:
        head = _heads.decode(line)
    except (DecodeError, UnicodeDecodeError) as error:  # of which ValidationError is one
        raise _unreadable(line, error) from error
    if head.v != FORMAT or not newline:
        raise _unreadable(line, None)
    asked, answered = head.request.body[0], head.answer.body[0]
    if asked < 0 or answered < 0 or len(bodies) != asked + answered:
        raise CaptureError(
            f"a capture is damaged: {asked + answered} bytes of bodies are promised, {len(bodies)} are there"
        )
    return _capture(head, bodies[:asked], bodies[asked:])


def _unreadable(line: bytes, error: Exception | None) -> CaptureError:
    try:
        version = _formats.decode(line).v
    except (DecodeError, UnicodeDecodeError) as problem:
        return CaptureError(f"a capture must begin with a line of JSON, an object: {problem}")
    if version != FORMAT:
        return CaptureError(f"a capture of format {version!r} can't be read; this code reads format {FORMAT}")
    if isinstance(error, ValidationError):
        return CaptureError(f"a capture lacks something or is damaged: {error}")
    return CaptureError("a capture must begin with a JSON object on a line of its own")


def _capture(head: Head, asked: bytes, answered: bytes) -> Capture:
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
            Body(asked, request.body[1], request.body[2]),
        ),
        Answer(
            answer.status, answer.headers, Body(answered, answer.body[1], answer.body[2]), answer.trailers
        ),
        head.attempt,
        head.arms,
        head.release,
        head.started,
        head.first_byte_us,
        head.total_us,
        head.client_left,
        head.complete,
        head.raised,
        head.effects,
        head.effects_dropped,
        head.hops,
        head.cache,
        head.disturbed,
        head.going_on,
    )
