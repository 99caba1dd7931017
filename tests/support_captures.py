"""Captures for tests, with everything defaulted."""

from __future__ import annotations

import json
from typing import Any

from abreast.protocol.capture import (
    FORMAT_VERSION,
    Answer,
    AnswerHead,
    Body,
    Capture,
    CaptureHead,
    Headers,
    Request,
    RequestHead,
    Role,
    Version,
    body_metadata,
    encode_parts,
)

JSON: Headers = (("content-type", "application/json"),)


def capture(
    version: Version,
    body: Any = b"",
    *,
    role: Role = "live",
    status: int = 200,
    headers: Headers = JSON,
    method: str = "GET",
    path: str = "/products/7",
    route: str = "/products/{id}",
    request_headers: Headers = (),
    attempt: int = 1,
    complete: bool = True,
    client_left: bool = False,
    exception: str = "",
) -> Capture:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Capture(
        pair="0d7c1e3a-0000-4000-8000-000000000001",
        service="shop",
        version=version,
        role=role,
        attempt=attempt,
        request=Request(method=method, path=path, route=route, headers=request_headers),
        answer=Answer(status=status, headers=headers, body=Body(content=content, length=len(content))),
        total_us=1500,
        wait_us=0,
        in_flight=0,
        complete=complete,
        client_left=client_left,
        exception=exception,
    )


def encode(capture: Capture) -> bytes:
    """Encode a capture as a service does."""
    request, answer = capture.request, capture.answer
    fields = {
        name: getattr(capture, name) for name in CaptureHead.__struct_fields__ if name in Capture.__struct_fields__
    }
    fields["request"] = RequestHead(
        request.method, request.path, request.query, request.route, request.headers, body_metadata(request.body)
    )
    fields["answer"] = AnswerHead(answer.status, answer.headers, answer.trailers, body_metadata(answer.body))
    return encode_parts(CaptureHead(v=FORMAT_VERSION, **fields), request.body.content, answer.body.content)
