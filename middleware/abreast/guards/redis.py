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
PUBLISHES: Mapping[str, object] = {
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

    holds: ClassVar[Mapping[str, object]] = PUBLISHES

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        held = _effect(self, args)
        if held is None:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await held.run(super().execute_command, *args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        made = GuardedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.holds = self.holds
        return made


class GuardedPipeline(Pipeline):
    """Of a GuardedRedis. Effects are recorded when the pipeline is executed."""

    holds: Mapping[str, object] = PUBLISHES

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._effects: list[tuple[Any, ...]] = []
        self._held: list[tuple[int, object]] = []  # where in the answers, and what

    def pipeline_execute_command(self, *args: Any, **options: Any) -> Any:
        name = _name(args)
        if name in self.holds:
            self._effects.append(args)
            if is_shadow():
                place = len(self.command_stack) + len(self._held)
                self._held.append((place, _answer(self.connection_pool, self.holds[name])))
                return self
        return super().pipeline_execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        held = _effect(self, args)
        if held is None:
            return await super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await held.run(super().immediate_execute_command, *args, **options)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        held, self._held = self._held, []
        effects, self._effects = self._effects, []
        for args in effects:
            record(_kind(args), _payload(args), key=_key(args))
        answers = await super().execute(raise_on_error)
        for place, stand_in in held:
            answers.insert(place, stand_in)
        return answers

    async def reset(self) -> None:  # type: ignore[override]  # as Pipeline's own
        self._effects, self._held = [], []
        await super().reset()  # type: ignore[no-untyped-call]


def _effect(client: GuardedRedis | GuardedPipeline, args: tuple[Any, ...]) -> Effect[Any] | None:
    name = _name(args)
    if name not in client.holds:
        return None
    answer = _answer(client.connection_pool, client.holds[name])
    return effect(_kind(args), lambda *_, **__: _payload(args), key=_key(args), stand_in=answer)


def _answer(pool: ConnectionPool, answer: object) -> object:
    """As the client would get it."""
    decoded = isinstance(answer, bytes) and pool.connection_kwargs.get("decode_responses")
    return _text(answer) if decoded else answer


def _name(args: tuple[Any, ...]) -> str:
    return _text(args[0]).upper()


def _kind(args: tuple[Any, ...]) -> str:
    return f"redis.{_text(args[0]).lower()}"


def _key(args: tuple[Any, ...]) -> str:
    return _text(args[1]) if len(args) > 1 else ""


def _payload(args: tuple[Any, ...]) -> Any:
    """What is pushed or published; of an entry of a stream its fields. JSON is read, to be compared by its paths."""
    rest = list(args[2:])
    if _name(args) == "XADD" and "*" in rest:
        fields = rest[rest.index("*") + 1 :]
        return {_text(name): _value(value) for name, value in list(pairwise(fields))[::2]}
    values = [_value(value) for value in rest]
    return values[0] if len(values) == 1 else values


def _value(value: Any) -> Any:
    if not isinstance(value, str | bytes | bytearray | memoryview):
        return value
    try:
        return json.loads(
            bytes(value) if isinstance(value, memoryview) else value
        )  # exact, also of large integers
    except (ValueError, RecursionError):
        return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    return str(value)
