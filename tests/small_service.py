"""A service in two versions: small_service.py VERSION PORT [bare]. With `bare`, it has no middleware.

Its stream of events never ends, and the third event of new differs. After SIGUSR1, products return 500. Jobs are equal in
both versions, and one worker runs them.
"""

from __future__ import annotations

import asyncio
import math
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from itertools import count

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from abreast import ParallelRunMiddleware

VERSION, PORT, *OPTIONS = sys.argv[1:]

failing: list[int] = []
worker = threading.Lock()
signal.signal(signal.SIGUSR1, lambda number, _frame: failing.append(number))


async def product(request: Request) -> JSONResponse:
    if failing:
        return JSONResponse({"error": "broken"}, 500)
    price = int(request.path_params["id"]) + 0.5
    return JSONResponse({"name": "Tea", "price": str(price) if VERSION == "new" else price})


async def events(_request: Request) -> StreamingResponse:
    async def endless() -> AsyncIterator[str]:
        for number in count(1):
            name = VERSION if number == 3 else "any"
            yield f'id: {number}\ndata: {{"name": "{name}"}}\n\n'
            await asyncio.sleep(0.05)

    return StreamingResponse(endless(), media_type="text/event-stream")


def job(request: Request) -> JSONResponse:
    with worker:  # requests wait in threads of the process
        time.sleep(random.lognormvariate(math.log(0.05), 0.5))
    return JSONResponse({"job": request.path_params["id"]})


async def slow(_request: Request) -> JSONResponse:
    await asyncio.sleep(0.03)
    return JSONResponse({"ok": True})


async def healthy(_request: Request) -> JSONResponse:
    return JSONResponse({"ok": True})


app = Starlette(
    routes=[
        Route("/products/{id}", product),
        Route("/events", events),
        Route("/jobs/{id}", job),
        Route("/slow", slow),
        Route("/healthz", healthy),
    ]
)
if "bare" not in OPTIONS:
    app.add_middleware(ParallelRunMiddleware, service="shop", release=f"{VERSION}-1")
uvicorn.run(app, host="127.0.0.1", port=int(PORT), log_level="warning")
