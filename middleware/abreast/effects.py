"""What code does that lasts, such as sending a mail: done and recorded for a user, only recorded for a shadow."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from abreast.context import CURRENT, Current
from abreast.errors import EffectError
from abreast.journal import Entry
from abreast.outlived import outlived
from abreast.rescue import Rescue

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")  # of the stand-in


class Missing:
    """Nothing was given: the payload is the arguments of what runs."""


MISSING = Missing()
RESCUE = Rescue()


def record(kind: str, payload: Any = None, *, key: str = "", note: bool = False) -> None:
    """Write down what happened, or would have happened, in a request that is captured. Never raises.

    Effects of one kind and key are compared in their order. A note travels with the capture and is not compared.
    """
    _record(CURRENT.get(), kind, payload, key, compared=not note)


def _record(now: Current, kind: str, payload: Any, key: str, *, compared: bool = True) -> Entry | None:
    sink = now.sink
    if sink is None:
        return None
    try:
        journal = now.journal()
        entry = journal.add(kind, payload, key, compared=compared)
        if entry is None and journal.closed:
            sink.late()
    except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
        RESCUE("recording an effect", error)
        return None
    return entry


@overload
def effect(kind: str, payload: Any = ..., *, key: str = ...) -> Effect[None]: ...
@overload
def effect(kind: str, payload: Any = ..., *, key: str = ..., stand_in: Callable[..., S]) -> Effect[S]: ...
@overload
def effect(kind: str, payload: Any = ..., *, key: str = ..., stand_in: S) -> Effect[S]: ...
def effect(kind: str, payload: Any = MISSING, *, key: str = "", stand_in: Any = None) -> Effect[Any]:
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
    for given in (payload, stand_in):
        if inspect.iscoroutinefunction(given):
            raise EffectError(
                f"{given.__qualname__} must be awaited; use a plain function for effect {kind!r}"
            )
    return Effect(kind, payload, key, stand_in)


class Effect(Generic[S]):
    def __init__(self, kind: str, payload: Any, key: str, stand_in: Any) -> None:
        self.kind = kind
        self.payload = payload
        self.key = key
        self.stand_in = stand_in
        self._blocks: list[Attempt[S]] = []

    async def run(self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | S:
        """Await `func(*args, **kwargs)` for a user; give the stand-in to a shadow."""
        return await Attempt(self).run(func, *args, **kwargs)

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | S:
        """The same for what is not awaited."""
        return Attempt(self).call(func, *args, **kwargs)

    @overload
    def __call__(
        self, func: Callable[P, Coroutine[Any, Any, T]]
    ) -> Callable[P, Coroutine[Any, Any, T | S]]: ...
    @overload
    def __call__(self, func: Callable[P, T]) -> Callable[P, T | S]: ...
    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """As a decorator: every call of the function is an effect."""
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise EffectError(
                f"{func.__qualname__} is a generator, which can't be held back; wrap what it calls"
            )
        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def run(*args: Any, **kwargs: Any) -> Any:
                return await Attempt(self).run(func, *args, **kwargs)

            return run

        @functools.wraps(func)
        def call(*args: Any, **kwargs: Any) -> Any:
            return Attempt(self).call(func, *args, **kwargs)

        return call

    def __enter__(self) -> Attempt[S]:
        attempt = Attempt(self, _here())
        self._blocks.append(attempt)
        return attempt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        attempt = self._left()
        if kind is not None:
            attempt.failed(kind)
        elif not attempt.asked:
            _forgotten(self.kind)

    def _left(self) -> Attempt[S]:
        """The last block that began here: one effect may be shared by tasks and threads, which end in any order."""
        here = _here()
        blocks = self._blocks[::-1]
        attempt = next((each for each in blocks if each.here is here), blocks[0])
        self._blocks.remove(attempt)
        return attempt

    async def __aenter__(self) -> Attempt[S]:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


class Attempt(Generic[S]):
    """One time that an effect is done or held back. It is recorded once, when it is first asked."""

    def __init__(self, effect: Effect[S], here: object = None) -> None:
        self.here = here  # task or thread
        self._effect = effect
        self._entry: Entry | None = None
        self._live = False
        self.asked = False

    @property
    def live(self) -> bool:
        """Whether to do it."""
        return self._ask(None, (), {})

    async def run(self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | S:
        if not self._ask(func, args, kwargs):
            return self._stand_in(args, kwargs)
        try:
            return await func(*args, **kwargs)
        except BaseException as error:
            self.failed(type(error))
            raise

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | S:
        if inspect.iscoroutinefunction(func):
            raise EffectError(f"{func.__qualname__} must be awaited; use: await effect(...).run(...)")
        if not self._ask(func, args, kwargs):
            return self._stand_in(args, kwargs)
        try:
            return func(*args, **kwargs)
        except BaseException as error:
            self.failed(type(error))
            raise

    def failed(self, kind: type[BaseException]) -> None:
        if self._entry is not None:
            self._entry.error = kind.__name__

    def _ask(self, func: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if not self.asked:
            self.asked = True
            now = CURRENT.get()
            self._live = not now.shadow
            if not self._live:
                outlived(now, f"effect {self._effect.kind!r}")
            if now.sink is not None:
                effect = self._effect
                payload = _payload(effect.payload, func, args, kwargs)
                self._entry = _record(now, effect.kind, payload, effect.key)
        return self._live

    def _stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> S:
        stand_in = self._effect.stand_in
        return cast("S", stand_in(*args, **kwargs) if callable(stand_in) else stand_in)


def _here() -> object:
    import asyncio  # late: the command line starts faster without it

    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no loop runs in this thread
        return threading.current_thread()


def _payload(
    payload: Any, func: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    try:
        if payload is MISSING:
            return None if func is None else _arguments(func, args, kwargs)
        return payload(*args, **kwargs) if callable(payload) else payload
    except Exception as error:  # noqa: BLE001  # the effect goes on
        RESCUE("making an effect's payload", error)
        return f"<no payload: {type(error).__name__}>"


def _arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in {"self", "cls"}}


def _forgotten(kind: str) -> None:
    """A body that never asks runs for shadows too. That must be found while the code is written."""
    message = (
        f"the block of effect {kind!r} asked neither .live nor .run() nor .call(), so shadow requests run it too; "
        "put what must not be done twice behind one of them"
    )
    if sys.flags.dev_mode or "PYTEST_VERSION" in os.environ:
        raise EffectError(message)
    RESCUE("an effect", EffectError(message))
