"""What no two answers of the shop share: an id, a time, the order of a set."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SEARCH_HEADER = "x-search-id"


class RequestIds:
    """An id of the service's own, since that of Envoy is the same for all copies of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = identity

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = identity
            await send(message)

        await self.app(scope, receive, send_with_id)


def now() -> str:
    return datetime.now(UTC).isoformat()


def any_order(members: Iterable[int]) -> list[int]:
    """A set has no order, and here it shows."""
    found = list(members)
    random.shuffle(found)
    return found
