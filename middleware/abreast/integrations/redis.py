"""redis-py's asyncio client for services that receive shadow requests: publishing and queueing is held back in shadows.

All other commands run. For keys that a shadow writes, use `abreast.cache` or a separate database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import redis.asyncio
from redis.asyncio import ConnectionPool
from redis.asyncio.client import Pipeline

from abreast.context import is_shadow
from abreast.effects import Effect, effect, record

# Commands that other processes notice, and the replies that a shadow receives.
# fmt: off
PUBLISH_STAND_INS: Mapping[str, object] = {
    "PUBLISH": 0, "SPUBLISH": 0, "XADD": b"0-0", "LPUSH": 1, "LPUSHX": 1, "RPUSH": 1, "RPUSHX": 1,
}
# fmt: on


class RecordingRedis(redis.asyncio.Redis):
    """A client that records publishing commands and holds them back in shadows.

    A subclass can change `stand_ins`, which maps the name of a command to the reply that a shadow receives.
    """

    stand_ins: ClassVar[Mapping[str, object]] = PUBLISH_STAND_INS

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        command_effect = _make_effect(self, args)
        if command_effect is None:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await command_effect.run(super().execute_command, *args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        pipeline = RecordingPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.stand_ins = self.stand_ins
        return pipeline


class RecordingPipeline(Pipeline):
    """A pipeline of `RecordingRedis`. It records effects when it is executed."""

    stand_ins: Mapping[str, object] = PUBLISH_STAND_INS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._effect_args: list[tuple[Any, ...]] = []
        self._pending_replies: list[tuple[int, object]] = []  # position among the replies, and the reply

    def pipeline_execute_command(self, *args: Any, **options: Any) -> Any:
        name = _get_command_name(args)
        if name in self.stand_ins:
            self._effect_args.append(args)
            if is_shadow():
                position = len(self.command_stack) + len(self._pending_replies)
                self._pending_replies.append((position, _encode_reply(self.connection_pool, self.stand_ins[name])))
                return self
        return super().pipeline_execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        command_effect = _make_effect(self, args)
        if command_effect is None:
            return await super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await command_effect.run(super().immediate_execute_command, *args, **options)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        pending_replies, self._pending_replies = self._pending_replies, []
        effect_args, self._effect_args = self._effect_args, []
        for args in effect_args:
            record(_get_effect_kind(args), _build_payload(args), key=_get_effect_key(args))
        replies = await super().execute(raise_on_error)
        for position, stand_in in pending_replies:
            replies.insert(position, stand_in)
        return replies

    async def reset(self) -> None:  # type: ignore[override]  # redis-py does the same
        self._effect_args, self._pending_replies = [], []
        await super().reset()  # type: ignore[no-untyped-call]


def _make_effect(client: RecordingRedis | RecordingPipeline, args: tuple[Any, ...]) -> Effect[Any] | None:
    name = _get_command_name(args)
    if name not in client.stand_ins:
        return None
    reply = _encode_reply(client.connection_pool, client.stand_ins[name])
    return effect(
        _get_effect_kind(args), lambda *_, **__: _build_payload(args), key=_get_effect_key(args), stand_in=reply
    )


def _encode_reply(pool: ConnectionPool, reply: object) -> object:
    """Return the reply as text if the client decodes replies."""
    is_decoded = isinstance(reply, bytes) and pool.connection_kwargs.get("decode_responses")
    return _decode_text(reply) if is_decoded else reply


def _get_command_name(args: tuple[Any, ...]) -> str:
    return _decode_text(args[0]).upper()


def _get_effect_kind(args: tuple[Any, ...]) -> str:
    return f"redis.{_decode_text(args[0]).lower()}"


def _get_effect_key(args: tuple[Any, ...]) -> str:
    return _decode_text(args[1]) if len(args) > 1 else ""


def _build_payload(args: tuple[Any, ...]) -> Any:
    """Return the published values, or the fields of a stream entry. JSON is parsed, so that findings name its paths."""
    arguments = args[2:]
    if _get_command_name(args) == "XADD" and "*" in arguments:
        fields = arguments[arguments.index("*") + 1 :]
        return {_decode_text(name): _decode_value(value) for name, value in list(pairwise(fields))[::2]}
    values = [_decode_value(value) for value in arguments]
    return values[0] if len(values) == 1 else values


def _decode_value(value: Any) -> Any:
    if not isinstance(value, str | bytes | bytearray | memoryview):
        return value
    try:  # the standard library keeps large integers exact
        return json.loads(bytes(value) if isinstance(value, memoryview) else value)
    except (ValueError, RecursionError):
        return _decode_text(value)


def _decode_text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    return str(value)
