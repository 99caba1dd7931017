"""The service that the benchmarks measure: service.py PORT bare|abreast|otel|basehttp."""

from __future__ import annotations

import json
import random
import sys
import time
import uuid
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from abreast import ParallelRunMiddleware

ITEMS = [
    {"id": n, "name": f"article {n}", "price": 9.99 + n, "currency": "EUR", "tags": ["new", "sale"]} for n in range(22)
]


class NoopMiddleware(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


async def products(_request: Request) -> JSONResponse:
    return JSONResponse({"page": 1, "total": len(ITEMS), "items": ITEMS})


def noisy_body() -> bytes:
    """Return 1.6 KB of JSON that differs between any two calls: an id, a clock and a shuffled list."""
    tags = [f"tag-{number}" for number in range(8)]
    random.shuffle(tags)
    content = {"request": str(uuid.uuid4()), "at": time.time(), "tags": tags, "items": ITEMS[:16]}
    return json.dumps(content, separators=(",", ":")).encode()


async def noisy(_request: Request) -> Response:
    return Response(noisy_body(), media_type="application/json")


async def healthy(_request: Request) -> JSONResponse:
    return JSONResponse({"ok": True})


def wrapped(app: Any, kind: str) -> Any:
    """Return the application with the middleware of the given kind."""
    if kind == "abreast":
        return ParallelRunMiddleware(app, service="bench")
    if kind == "basehttp":
        return NoopMiddleware(app)
    if kind == "otel":
        return traced(app)
    return app


def traced(app: Any) -> Any:
    """Return the application with OpenTelemetry's middleware and a tracer that drops its spans."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.trace import TracerProvider

    return OpenTelemetryMiddleware(app, tracer_provider=TracerProvider())


def main() -> None:
    port, kind = int(sys.argv[1]), sys.argv[2]
    app = Starlette(routes=[Route("/products", products), Route("/noisy", noisy), Route("/healthz", healthy)])
    uvicorn.run(wrapped(app, kind), host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
