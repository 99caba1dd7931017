"""What no two answers of the shop share: an id, a time, the order of a set."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SEARCH_ID_HEADER = "x-search-id"


class RequestIdMiddleware:
    """An id of the service's own, since that of Envoy is the same for all copies of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def current_timestamp() -> str:
    return datetime.now(UTC).isoformat()


def shuffle_members(members: Iterable[int]) -> list[int]:
    """A set has no order, and here it shows."""
    shuffled_members = list(members)
    random.shuffle(shuffled_members)
    return shuffled_members
