"""Stands where a recorder would, in a marked request that is not captured: it only notes when the answer is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from abreast.context import RequestContext

Message = MutableMapping[str, Any]


class UncapturedRequest:
    app_returned = False
    finished_ns = 0  # as a recorder's, so that it is always told when the app has left

    def __init__(
        self,
        context: RequestContext,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self.context = context
        self._send = send
        self.receive = receive

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.context.response_sent = True
        await self._send(message)

    def mark_app_finished(self, _exception: str) -> None:
        self.context.response_sent = True
