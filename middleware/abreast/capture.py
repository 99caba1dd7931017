"""What one version did with one request: the contract between services and sidecar, format 1.

A capture travels as one blob: a JSON object on one line, a newline, then the held bytes of the request's body and
of the answer's body. Services write it and the sidecar reads it, both with this module.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import orjson

from abreast.errors import CaptureError

FORMAT = 1
DIGEST_SIZE = 16  # bytes

Version = Literal["old", "new"]
Role = Literal["live", "shadow", "baseline"]
HopRow = tuple[str, str, int, int, str]  # kind, name, µs since the arrival, µs taken, note
Headers = tuple[tuple[str, str], ...]  # latin-1 text, in order, duplicates kept, names in lower case

VERSIONS = ("old", "new")
ROLES = ("live", "shadow", "baseline")


@dataclass(frozen=True, slots=True)
class Body:
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


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # raw, as sent, percent-encoding kept
    query: str = ""  # raw, without the question mark
    route: str = ""  # template such as /products/{id}; empty when the framework tells none
    headers: Headers = ()  # only chosen ones; secrets as keyed hashes
    body: Body = field(default_factory=Body)


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` is 0 when the app never started an answer."""

    status: int
    headers: Headers = ()
    body: Body = field(default_factory=Body)
    trailers: Headers = ()


@dataclass(frozen=True, slots=True)
class Capture:
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

    @property
    def slot(self) -> str:
        """Names this capture within its pair: a batch that is sent twice changes nothing."""
        return f"{self.version}:{self.role}:{self.attempt}"


def digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=DIGEST_SIZE).hexdigest()


def encode(capture: Capture) -> bytes:
    request, answer = capture.request, capture.answer
    head = {
        "v": FORMAT,
        "pair": capture.pair,
        "service": capture.service,
        "version": capture.version,
        "role": capture.role,
        "attempt": capture.attempt,
        "arms": capture.arms,
        "release": capture.release,
        "started": capture.started,
        "first_byte_us": capture.first_byte_us,
        "total_us": capture.total_us,
        "client_left": capture.client_left,
        "complete": capture.complete,
        "raised": capture.raised,
        "effects": capture.effects,
        "effects_dropped": capture.effects_dropped,
        "request": {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "route": request.route,
            "headers": request.headers,
            "body": _body_head(request.body),
        },
        "answer": {
            "status": answer.status,
            "headers": answer.headers,
            "trailers": answer.trailers,
            "body": _body_head(answer.body),
        },
    }
    if capture.hops:
        head["hops"] = capture.hops
    if capture.cache is not None:
        head["cache"] = capture.cache
    return b"".join((orjson.dumps(head), b"\n", request.body.held, answer.body.held))


def _body_head(body: Body) -> list[int | str]:
    return [len(body.held), body.length, body.digest]


def decode(blob: bytes) -> Capture:
    """Raise CaptureError for what is no capture, damaged, or of a newer format."""
    line, newline, bodies = blob.partition(b"\n")
    try:
        head = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CaptureError(f"a capture must begin with a line of JSON: {error}") from error
    if not isinstance(head, dict) or not newline:
        raise CaptureError("a capture must begin with a JSON object on a line of its own")
    if head.get("v") != FORMAT:
        raise CaptureError(
            f"a capture of format {head.get('v')!r} can't be read; this code reads format {FORMAT}"
        )
    try:
        return _capture(head, bodies)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CaptureError(
            f"a capture lacks something or is damaged: {type(error).__name__}: {error}"
        ) from error


def _capture(head: dict[str, Any], bodies: bytes) -> Capture:
    request, answer = head["request"], head["answer"]
    asked, answered = _int(request["body"][0]), _int(answer["body"][0])
    if asked < 0 or answered < 0 or len(bodies) != asked + answered:
        raise ValueError(f"{asked + answered} bytes of bodies are promised, {len(bodies)} are there")
    if head["version"] not in VERSIONS or head["role"] not in ROLES:
        raise ValueError(f"version {head['version']!r}, role {head['role']!r}")
    first_byte_us = head["first_byte_us"]
    texts = (head["pair"], head["service"], head["release"], head["raised"])
    pair, service, release, raised = _texts(texts)
    return Capture(
        pair,
        service,
        head["version"],
        head["role"],
        _request(request, bodies[:asked]),
        _answer(answer, bodies[asked:]),
        _int(head["attempt"]),
        _int(head["arms"]),
        release,
        float(head["started"]),
        None if first_byte_us is None else _int(first_byte_us),
        _int(head["total_us"]),
        bool(head["client_left"]),
        bool(head["complete"]),
        raised,
        tuple(head["effects"]),
        _int(head.get("effects_dropped", 0)),  # captures written before there were effects lack it
        _hops(head.get("hops", ())),
        _cache(head.get("cache")),
    )


def _request(head: dict[str, Any], held: bytes) -> Request:
    texts = (head["method"], head["path"], head["query"], head["route"])
    method, path, query, route = _texts(texts)
    return Request(method, path, query, route, _headers(head["headers"]), _body(head["body"], held))


def _answer(head: dict[str, Any], held: bytes) -> Answer:
    trailers = head["trailers"]
    return Answer(
        _int(head["status"]),
        _headers(head["headers"]),
        _body(head["body"], held),
        _headers(trailers) if trailers else (),
    )


def _hops(rows: Any) -> tuple[HopRow, ...]:
    hops = [(kind, name, _int(at), _int(took), note) for kind, name, at, took, note in rows]
    "".join(chain.from_iterable((kind, name, note) for kind, name, _, _, note in hops))
    return tuple(hops)


def _cache(row: Any) -> tuple[int, int] | None:
    if row is None:
        return None
    hits, misses = row
    return _int(hits), _int(misses)


def _int(value: Any) -> int:
    return value if value.__class__ is int else int(value)


def _texts(values: tuple[Any, ...]) -> tuple[str, ...]:
    "".join(values)  # the quickest way to refuse what is no text
    return values


def _headers(rows: Any) -> Headers:
    headers = [(name, value) for name, value in rows]
    "".join(chain.from_iterable(headers))
    return tuple(headers)


def _body(row: Any, held: bytes) -> Body:
    _, length, digest_ = row
    return Body(held, _int(length), _texts((digest_,))[0])
