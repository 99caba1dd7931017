"""Stands where a recorder would, in a marked request that is not captured: it only notes when the answer is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from abreast.context import Current

Message = MutableMapping[str, Any]


class Bystander:
    returned = False
    finished = 0  # as a recorder's, so that it is always told when the app has left

    def __init__(
        self,
        now: Current,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self.now = now
        self._send = send
        self.receive = receive

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.now.answered = True
        await self._send(message)

    def left(self, _raised: str) -> None:
        self.now.answered = True
