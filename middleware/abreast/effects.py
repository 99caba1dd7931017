"""What code does that lasts, such as sending a mail: done and recorded for a user, only recorded for a shadow."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.effect_log import EffectRecord
from abreast.errors import EffectError, ErrorReporter

logger = logging.getLogger("abreast")

MAX_SHADOW_AGE_S = 60.0  # seconds since the request came
MAX_WARNED_NAMES = 100  # names that are remembered
WARNED_NAMES: set[str] = set()


def warn_if_request_outlived(context: RequestContext, name: str) -> None:
    """Once for each name."""
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
            "%s is held back %d s after its shadow request; what serves users too must be started outside of requests, or "
            "with context=contextvars.Context() (logged once)",
            name,
            age_s,
        )


P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")  # of the stand-in


class _Unset:
    """Nothing was given: the payload is the arguments of what runs."""


_UNSET = _Unset()
report_error = ErrorReporter()


def record(kind: str, payload: Any = None, *, key: str = "", note: bool = False) -> None:
    """Write down what happened, or would have happened, in a request that is captured. Never raises.

    Effects of one kind and key are compared in their order. A note travels with the capture and is not compared.
    """
    _record(CURRENT_CONTEXT.get(), kind, payload, key, compared=not note)


def _record(
    context: RequestContext, kind: str, payload: Any, key: str, *, compared: bool = True
) -> EffectRecord | None:
    sink = context.sink
    if sink is None:
        return None
    try:
        effect_log = context.ensure_effect_log()
        effect_record = effect_log.add(kind, payload, key, compared=compared)
        if effect_record is None and effect_log.is_closed:
            sink.count_late_effect()
    except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
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
    """Declare something that must happen for users only, such as effect("email.send", {"to": address}).

    `payload` is what is compared: anything that has a form in JSON, or a function that makes it of the arguments of
    what runs; without one it is these arguments. `stand_in` is what a shadow request goes on with: a value, or a
    function that makes it of the same arguments. Use it in one of these ways:

        await effect(...).run(send, message)
        effect(...).call(send_now, message)

        async with effect(...) as held:
            if held.live:
                ...

        @effect("email.send", stand_in=Receipt("none"))
        async def send(to: str, text: str) -> Receipt: ...
    """
    for argument in (payload, stand_in):
        if inspect.iscoroutinefunction(argument):
            raise EffectError(f"{argument.__qualname__} must be awaited; use a plain function for effect {kind!r}")
    return Effect(kind, payload, key, stand_in)


class Effect(Generic[S]):
    def __init__(self, kind: str, payload: Any, key: str, stand_in: Any) -> None:
        self.kind = kind
        self.payload = payload
        self.key = key
        self.stand_in = stand_in
        self._open_scopes: list[EffectScope[S]] = []

    async def run(self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | S:
        """Await `func(*args, **kwargs)` for a user; give the stand-in to a shadow."""
        return await EffectScope(self).run(func, *args, **kwargs)

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | S:
        """The same for what is not awaited."""
        return EffectScope(self).call(func, *args, **kwargs)

    @overload
    def __call__(self, func: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T | S]]: ...
    @overload
    def __call__(self, func: Callable[P, T]) -> Callable[P, T | S]: ...
    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """As a decorator: every call of the function is an effect."""
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise EffectError(f"{func.__qualname__} is a generator, which can't be held back; wrap what it calls")
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        scope = self._pop_scope()
        if kind is not None:
            scope.record_failure(kind)
        elif not scope.is_recorded:
            _report_unused_scope(self.kind)

    def _pop_scope(self) -> EffectScope[S]:
        """The last block that began here: one effect may be shared by tasks and threads, which end in any order."""
        owner = _get_owner()
        scopes = self._open_scopes[::-1]
        scope = next((candidate for candidate in scopes if candidate.owner is owner), scopes[0])
        self._open_scopes.remove(scope)
        return scope

    async def __aenter__(self) -> EffectScope[S]:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


class EffectScope(Generic[S]):
    """One time that an effect is done or held back. It is recorded once, when it is first asked."""

    def __init__(self, effect: Effect[S], owner: object = None) -> None:
        self.owner = owner  # task or thread
        self._effect = effect
        self._effect_record: EffectRecord | None = None
        self._should_execute = False
        self.is_recorded = False

    @property
    def should_execute(self) -> bool:
        """Whether to do it."""
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
    import asyncio  # late: the command line starts faster without it

    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no loop runs in this thread
        return threading.current_thread()


def _build_payload(
    payload: Any, func: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    try:
        if payload is _UNSET:
            return None if func is None else _bind_arguments(func, args, kwargs)
        return payload(*args, **kwargs) if callable(payload) else payload
    except Exception as error:  # noqa: BLE001  # the effect goes on
        report_error("making an effect's payload", error)
        return f"<no payload: {type(error).__name__}>"


def _bind_arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in {"self", "cls"}}


def _report_unused_scope(kind: str) -> None:
    """A body that never asks runs for shadows too. That must be found while the code is written."""
    message = (
        f"the block of effect {kind!r} asked neither .live nor .run() nor .call(), so shadow requests run it too; "
        "put what must not be done twice behind one of them"
    )
    if sys.flags.dev_mode or "PYTEST_VERSION" in os.environ:
        raise EffectError(message)
    report_error("an effect", EffectError(message))
