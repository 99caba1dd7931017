"""Effects, such as sending a mail: executed and recorded for users, only recorded for shadow requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from time import perf_counter_ns
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import orjson

from abreast.context import CURRENT_CONTEXT, EffectRecord, RequestContext
from abreast.errors import EffectError, ErrorReporter

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")  # type of the stand-in

logger = logging.getLogger("abreast")
report_error = ErrorReporter()

MAX_SHADOW_AGE_S = 60.0  # seconds since the arrival of the request
MAX_PAYLOAD_DEPTH = 50  # for payloads that orjson refuses
MAX_WARNED_NAMES = 100
WARNED_NAMES: set[str] = set()
# Sorted, because of long payloads only digests are compared.
ORJSON_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS
_UNSET: Any = object()  # no payload: the arguments of the function are the payload


def warn_if_request_outlived(context: RequestContext, name: str) -> None:
    """Warn once per name if a long-lived task still counts as a shadow request, so that its effects are held back."""
    if (
        not (context.is_shadow and context.response_sent)
        or name in WARNED_NAMES
        or len(WARNED_NAMES) >= MAX_WARNED_NAMES
    ):
        return
    age_s = (perf_counter_ns() - context.started_ns) / 1e9
    if context.started_ns and age_s > MAX_SHADOW_AGE_S:
        WARNED_NAMES.add(name)
        logger.warning(
            "%s is held back %d s after its shadow request; start tasks that also serve users outside of requests, or "
            "with context=contextvars.Context() (logged once)",
            name,
            age_s,
        )


def record(kind: str, payload: Any = None, *, key: str = "", note: bool = False) -> None:
    """Record an effect of a captured request, or of a shadow that held the effect back. Never raises.

    `payload` is any object; it is compared as JSON. Effects of one kind and key are compared in their order. A note
    becomes part of the capture and is not compared.
    """
    _record(CURRENT_CONTEXT.get(), kind, payload, key, is_compared=not note)


def _record(
    context: RequestContext, kind: str, payload: Any, key: str, *, is_compared: bool = True
) -> EffectRecord | None:
    sink = context.sink
    if sink is None:
        return None
    try:
        at_us = (perf_counter_ns() - context.started_ns) // 1000
        effect_log = context.ensure_effect_log()
        effect_record = effect_log.add(kind, key, to_json(payload), at_us, is_compared=is_compared)
        if effect_record is None and effect_log.is_closed:
            sink.count_late_effect()
    except Exception as error:  # noqa: BLE001  # an internal error must not reach the app
        report_error("recording an effect", error)
        return None
    return effect_record


@overload
def effect(kind: str, payload: Any = ..., *, key: str = ...) -> Effect[None]: ...
@overload
def effect(kind: str, payload: Any = ..., *, key: str = ..., stand_in: Callable[..., S]) -> Effect[S]: ...
@overload
def effect(kind: str, payload: Any = ..., *, key: str = ..., stand_in: S) -> Effect[S]: ...
def effect(kind: str, payload: Any = _UNSET, *, key: str = "", stand_in: Any = None) -> Effect[Any]:
    """Declare an effect that must happen for users only.

    `payload` is compared: a JSON value, or a function that makes it from the arguments of the wrapped function. By
    default it is these arguments. A shadow request gets `stand_in` as the result: a value, or a function of the same
    arguments. An effect is used in one of these ways:

        await effect(...).run(send, message)
        effect(...).call(send_now, message)

        async with effect(...) as scope:
            if scope.should_execute:
                ...

        @effect("email.send", stand_in=Receipt("none"))
        async def send(to: str, text: str) -> Receipt: ...
    """
    for argument in (payload, stand_in):
        if inspect.iscoroutinefunction(argument):
            raise EffectError(f"{argument.__qualname__} must be awaited; use a plain function for effect {kind!r}")
    return Effect(kind, payload, key, stand_in)


@dataclass(eq=False, repr=False)
class Effect(Generic[S]):
    """A declared effect. Tasks and threads may share it."""

    kind: str
    payload: Any
    key: str
    stand_in: Any
    _open_scopes: list[EffectScope[S]] = field(default_factory=list, init=False)

    async def run(self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | S:
        """Await `func(*args, **kwargs)` for a user, or return the stand-in to a shadow request."""
        return await EffectScope(self).run(func, *args, **kwargs)

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | S:
        """Call `func(*args, **kwargs)` for a user, or return the stand-in to a shadow request."""
        return EffectScope(self).call(func, *args, **kwargs)

    @overload
    def __call__(self, func: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T | S]]: ...
    @overload
    def __call__(self, func: Callable[P, T]) -> Callable[P, T | S]: ...
    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function, so that every call is an effect."""
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise EffectError(
                f"{func.__qualname__} is a generator, which can't be held back; wrap the functions that it calls"
            )
        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def run(*args: Any, **kwargs: Any) -> Any:
                return await EffectScope(self).run(func, *args, **kwargs)

            return run

        @functools.wraps(func)
        def call(*args: Any, **kwargs: Any) -> Any:
            return EffectScope(self).call(func, *args, **kwargs)

        return call

    def __enter__(self) -> EffectScope[S]:
        scope = EffectScope(self, _get_owner())
        self._open_scopes.append(scope)
        return scope

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        owner = _get_owner()  # scopes of other tasks and threads may end in any order
        scopes = self._open_scopes[::-1]
        scope = next((candidate for candidate in scopes if candidate.owner is owner), scopes[0])
        self._open_scopes.remove(scope)
        if kind is not None:
            scope.record_failure(kind)
        elif not scope.is_recorded:
            scope.report_unused()

    async def __aenter__(self) -> EffectScope[S]:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.__exit__(kind, *error)


class EffectScope(Generic[S]):
    """One use of an effect. The first use of `should_execute`, `run` or `call` records it."""

    def __init__(self, effect: Effect[S], owner: object = None) -> None:
        self.owner = owner  # a task or a thread
        self._effect = effect
        self._effect_record: EffectRecord | None = None
        self._should_execute = False
        self.is_recorded = False

    @property
    def should_execute(self) -> bool:
        """True for users, False for shadow requests."""
        return self._decide(None, (), {})

    async def run(self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | S:
        if not self._decide(func, args, kwargs):
            return self._make_stand_in(args, kwargs)
        try:
            return await func(*args, **kwargs)
        except BaseException as error:
            self.record_failure(type(error))
            raise

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | S:
        if inspect.iscoroutinefunction(func):
            raise EffectError(f"{func.__qualname__} must be awaited; use: await effect(...).run(...)")
        if not self._decide(func, args, kwargs):
            return self._make_stand_in(args, kwargs)
        try:
            return func(*args, **kwargs)
        except BaseException as error:
            self.record_failure(type(error))
            raise

    def record_failure(self, error_type: type[BaseException]) -> None:
        if self._effect_record is not None:
            self._effect_record.error = error_type.__name__

    def report_unused(self) -> None:
        """Report a block that also runs for shadow requests: as an exception in development and tests."""
        error = EffectError(
            f"the block of effect {self._effect.kind!r} uses neither .should_execute nor .run() nor .call(), so shadow "
            "requests run it too; guard the effect with one of them"
        )
        if sys.flags.dev_mode or "PYTEST_VERSION" in os.environ:
            raise error
        report_error("an effect", error)

    def _decide(self, func: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if not self.is_recorded:
            self.is_recorded = True
            context = CURRENT_CONTEXT.get()
            self._should_execute = not context.is_shadow
            if not self._should_execute:
                warn_if_request_outlived(context, f"effect {self._effect.kind!r}")
            if context.sink is not None:
                effect = self._effect
                payload = _build_payload(effect.payload, func, args, kwargs)
                self._effect_record = _record(context, effect.kind, payload, effect.key)
        return self._should_execute

    def _make_stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> S:
        stand_in = self._effect.stand_in
        return cast("S", stand_in(*args, **kwargs) if callable(stand_in) else stand_in)


def _get_owner() -> object:
    with contextlib.suppress(RuntimeError):  # no loop runs in this thread
        if (task := asyncio.current_task()) is not None:
            return task
    return threading.current_thread()


def _build_payload(
    payload: Any, func: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    try:
        if payload is _UNSET:
            if func is None:
                return None
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            return {name: value for name, value in bound.arguments.items() if name not in {"self", "cls"}}
        return payload(*args, **kwargs) if callable(payload) else payload
    except Exception as error:  # noqa: BLE001  # the effect happens all the same
        report_error("building the payload of an effect", error)
        return f"<no payload: {type(error).__name__}>"


def to_json(payload: Any) -> bytes:
    """Encode any object as JSON. An object without a JSON form becomes text that is the same in both versions."""
    try:
        return orjson.dumps(payload, default=_to_plain, option=ORJSON_OPTIONS)
    except (TypeError, ValueError, RecursionError):  # integers beyond 64 bits, lone surrogates, cycles
        return orjson.dumps(_to_readable(payload, 0), option=orjson.OPT_SORT_KEYS)


def _to_plain(value: Any) -> Any:
    """Convert types that orjson does not know."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, tuple | list):
        return list(value)
    with contextlib.suppress(Exception):  # code of the service
        dump = getattr(value, "model_dump", None)  # pydantic
        if callable(dump):
            return dump(mode="json")
    return f"<{type(value).__qualname__}>"  # without the address in memory


def _to_readable(value: Any, depth: int) -> Any:
    """Convert a payload that orjson refuses to encode."""
    if depth > MAX_PAYLOAD_DEPTH:
        return "<too deep>"
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if -(2**63) <= value < 2**64 else str(int(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_to_readable(str(name), 0): _to_readable(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_readable(item, depth + 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    try:
        return orjson.loads(orjson.dumps(value))  # dates, UUIDs, enumerations
    except (TypeError, ValueError):
        return _to_readable(_to_plain(value), depth + 1)
