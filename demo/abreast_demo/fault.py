"""A fault that can be switched on from outside, for `abreast drill`: SIGUSR1 makes a version answer 500, SIGUSR2 well."""

from __future__ import annotations

import signal

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HEALTH_PATH = "/healthz"


class FaultMiddleware:
    is_failing = False

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.is_failing and scope["type"] == "http" and scope["path"] != HEALTH_PATH:
            await JSONResponse({"detail": "out of order"}, 500)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @classmethod
    def install_signal_handlers(cls) -> None:
        def set_failing(number: int, _frame: object) -> None:
            cls.is_failing = number == signal.SIGUSR1

        signal.signal(signal.SIGUSR1, set_failing)
        signal.signal(signal.SIGUSR2, set_failing)
