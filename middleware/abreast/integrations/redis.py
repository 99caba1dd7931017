"""What a service publishes or queues with redis-py's asyncio client: held back in a shadow, recorded in both versions.

Other commands pass: keys that a shadow writes are for `abreast.cache`, or a database of its own.
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

# Commands that tell others something, and what a shadow gets for an answer.
PUBLISH_STAND_INS: Mapping[str, object] = {
    "PUBLISH": 0,
    "SPUBLISH": 0,
    "XADD": b"0-0",
    "LPUSH": 1,
    "LPUSHX": 1,
    "RPUSH": 1,
    "RPUSHX": 1,
}


class GuardedRedis(redis.asyncio.Redis):
    """A client like any other. `holds` may be changed in a subclass: a command's name, and a shadow's answer."""

    stand_ins: ClassVar[Mapping[str, object]] = PUBLISH_STAND_INS

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        command_effect = _make_effect(self, args)
        if command_effect is None:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await command_effect.run(super().execute_command, *args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        pipeline = GuardedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.stand_ins = self.stand_ins
        return pipeline


class GuardedPipeline(Pipeline):
    """Of a GuardedRedis. Effects are recorded when the pipeline is executed."""

    stand_ins: Mapping[str, object] = PUBLISH_STAND_INS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._effect_args: list[tuple[Any, ...]] = []
        self._pending_replies: list[tuple[int, object]] = []  # where in the answers, and what

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

    async def reset(self) -> None:  # type: ignore[override]  # as Pipeline's own
        self._effect_args, self._pending_replies = [], []
        await super().reset()  # type: ignore[no-untyped-call]


def _make_effect(client: GuardedRedis | GuardedPipeline, args: tuple[Any, ...]) -> Effect[Any] | None:
    name = _get_command_name(args)
    if name not in client.stand_ins:
        return None
    reply = _encode_reply(client.connection_pool, client.stand_ins[name])
    return effect(
        _get_effect_kind(args), lambda *_, **__: _build_payload(args), key=_get_effect_key(args), stand_in=reply
    )


def _encode_reply(pool: ConnectionPool, reply: object) -> object:
    """As the client would get it."""
    is_decoded = isinstance(reply, bytes) and pool.connection_kwargs.get("decode_responses")
    return _decode_text(reply) if is_decoded else reply


def _get_command_name(args: tuple[Any, ...]) -> str:
    return _decode_text(args[0]).upper()


def _get_effect_kind(args: tuple[Any, ...]) -> str:
    return f"redis.{_decode_text(args[0]).lower()}"


def _get_effect_key(args: tuple[Any, ...]) -> str:
    return _decode_text(args[1]) if len(args) > 1 else ""


def _build_payload(args: tuple[Any, ...]) -> Any:
    """What is pushed or published; of an entry of a stream its fields. JSON is read, to be compared by its paths."""
    arguments = list(args[2:])
    if _get_command_name(args) == "XADD" and "*" in arguments:
        fields = arguments[arguments.index("*") + 1 :]
        return {_decode_text(name): _decode_value(value) for name, value in list(pairwise(fields))[::2]}
    values = [_decode_value(value) for value in arguments]
    return values[0] if len(values) == 1 else values


def _decode_value(value: Any) -> Any:
    if not isinstance(value, str | bytes | bytearray | memoryview):
        return value
    try:
        return json.loads(bytes(value) if isinstance(value, memoryview) else value)  # exact, also of large integers
    except (ValueError, RecursionError):
        return _decode_text(value)


def _decode_text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    return str(value)
