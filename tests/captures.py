"""Captures for tests, with everything defaulted."""

from __future__ import annotations

import json
from typing import Any

from abreast.protocol.capture import Answer, Body, Capture, Headers, Request, Role, Version

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
    asked: Headers = (),
    attempt: int = 1,
    complete: bool = True,
    client_left: bool = False,
    raised: str = "",
) -> Capture:
    held = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Capture(
        pair="0d7c1e3a-0000-4000-8000-000000000001",
        service="shop",
        version=version,
        role=role,
        attempt=attempt,
        request=Request(method=method, path=path, route=route, headers=asked),
        answer=Answer(status=status, headers=headers, body=Body(content=held, length=len(held))),
        total_us=1500,
        complete=complete,
        client_left=client_left,
        exception=raised,
    )
