"""Effects: executed and recorded for users, held back and recorded for shadows."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import threading
import time
import uuid
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, assert_type

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abreast
from abreast import effects
from abreast.context import CURRENT_CONTEXT, MAX_EFFECTS, MAX_PAYLOAD_BYTES, NO_REQUEST, RequestContext
from abreast.effects import report_error, to_json
from abreast.errors import EffectError
from abreast.export.redaction import Redactor
from abreast.protocol.capture import Role

REDACTOR = Redactor("key")


class Sink:
    def __init__(self) -> None:
        self.count = 0

    def count_late_effect(self) -> None:
        self.count += 1


@dataclass
class Receipt:
    id: str


class Post:
    """A service that must receive each call once."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, to: str, text: str = "hi") -> Receipt:
        self.sent.append(to)
        if to == "nobody":
            raise OSError(text)
        return Receipt(f"real {text}")

    def send_now(self, to: str, text: str = "hi") -> Receipt:
        self.sent.append(to)
        if to == "nobody":
            raise OSError(text)
        return Receipt(f"real {text}")


@pytest.fixture
def enter() -> Iterator[Callable[[Role], RequestContext]]:
    tokens = []

    def begin(role: Role) -> RequestContext:
        context = RequestContext("new", role, "pair", "", Sink(), 0)
        tokens.append(CURRENT_CONTEXT.set(context))
        return context

    yield begin
    if tokens:
        CURRENT_CONTEXT.set(NO_REQUEST)


def get_records(context: RequestContext) -> list[dict[str, Any]]:
    closed, _ = context.close_effect_log(REDACTOR.redact_payload)
    return [{name: value for name, value in record.items() if name != "at_us"} for record in closed]


async def by_run(post: Post) -> Any:
    email = abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none"))
    return await email.run(post.send, "a@b")


async def by_lambda(post: Post) -> Any:
    email = abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none"))
    return await email.run(lambda: post.send("a@b"))


async def by_call(post: Post) -> Any:
    email = abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none"))
    return email.call(post.send_now, "a@b")


async def by_block(post: Post) -> Any:
    async with abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none")) as scope:
        return await scope.run(post.send, "a@b")


async def by_should_execute(post: Post) -> Any:
    async with abreast.effect("email.send", {"to": "a@b"}) as scope:
        if scope.should_execute:
            return await post.send("a@b")
        return Receipt("none")


async def by_should_execute_in_sync_code(post: Post) -> Any:
    with abreast.effect("email.send", {"to": "a@b"}) as scope:
        return post.send_now("a@b") if scope.should_execute else Receipt("none")


async def by_decorator(post: Post) -> Any:
    @abreast.effect("email.send", lambda to: {"to": to}, stand_in=Receipt("none"))
    async def send(to: str) -> Receipt:
        return await post.send(to)

    return await send("a@b")


async def by_sync_decorator(post: Post) -> Any:
    @abreast.effect("email.send", lambda to: {"to": to}, stand_in=lambda _to: Receipt("none"))
    def send(to: str) -> Receipt:
        return post.send_now(to)

    return send("a@b")


FORMS = [
    by_run,
    by_lambda,
    by_call,
    by_block,
    by_should_execute,
    by_should_execute_in_sync_code,
    by_decorator,
    by_sync_decorator,
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@forms
async def test_effect_of_a_user_runs_and_is_recorded(form: Any, enter: Any) -> None:
    context, post = enter("live"), Post()

    assert await form(post) == Receipt("real hi")
    assert post.sent == ["a@b"]
    assert get_records(context) == [{"kind": "email.send", "payload": {"to": "a@b"}}]


@forms
@pytest.mark.parametrize("role", ["shadow", "baseline"])
async def test_effect_of_a_copy_is_recorded_and_returns_the_stand_in(form: Any, role: Role, enter: Any) -> None:
    context, post = enter(role), Post()

    assert await form(post) == Receipt("none")
    assert post.sent == []
    assert get_records(context) == [{"kind": "email.send", "payload": {"to": "a@b"}}]


@forms
async def test_effect_outside_a_sampled_request_runs(form: Any) -> None:
    post = Post()

    assert await form(post) == Receipt("real hi")
    assert post.sent == ["a@b"]


async def test_effect_of_a_copy_without_capture_is_held_back(enter: Any) -> None:
    enter("live")
    CURRENT_CONTEXT.set(RequestContext("new", "shadow", "pair", ""))
    post = Post()

    assert await by_run(post) == Receipt("none")
    assert post.sent == []


def test_effect_long_after_its_shadow_is_logged_once(
    enter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a consumer that the first request started for all requests."""
    monkeypatch.setattr(effects, "WARNED_NAMES", set())
    email = abreast.effect("email.send")
    for role, is_sent, seconds in (
        ("shadow", True, 1),
        ("shadow", False, 90),
        ("live", True, 90),
        ("shadow", True, 90),
        ("shadow", True, 91),
    ):
        context = enter(role)
        context.response_sent, context.started_ns = is_sent, time.perf_counter_ns() - seconds * 10**9
        email.call(len, "abc")

    expected = "effect 'email.send' is held back 90 s after its shadow request"
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [expected]


async def test_effect_error_is_raised_and_recorded(enter: Any) -> None:
    context, post = enter("live"), Post()
    effect = abreast.effect("email.send", None)

    with pytest.raises(OSError, match="full"):
        await effect.run(post.send, "nobody", text="full")
    with pytest.raises(OSError, match="full"):
        effect.call(post.send_now, "nobody", text="full")
    with pytest.raises(OSError, match="full"):
        async with effect as scope:
            await scope.run(post.send, "nobody", "full")
    with pytest.raises(OSError, match="full"), effect as scope:
        scope.call(post.send_now, "nobody", "full")

    assert [record["error"] for record in get_records(context)] == ["OSError"] * 4


async def test_effect_payload_defaults_to_the_arguments(enter: Any) -> None:
    context = enter("shadow")

    class Mailer:
        @abreast.effect("email.send")
        async def send(self, to: str, text: str = "hi", **fields: int) -> None: ...

    await Mailer().send("a@b", urgent=1)
    await abreast.effect("email.send").run(Post().send, "a@b")

    assert [record["payload"] for record in get_records(context)] == [
        {"to": "a@b", "text": "hi", "fields": {"urgent": 1}},
        {"to": "a@b", "text": "hi"},
    ]


async def test_effect_stand_in_function_receives_the_arguments(enter: Any) -> None:
    enter("shadow")
    effect = abreast.effect("email.send", stand_in=lambda to, text="hi": Receipt(f"{to} {text}"))

    assert await effect.run(Post().send, "a@b", "ho") == Receipt("a@b ho")


async def test_effect_block_is_recorded_once_and_each_call_once(enter: Any) -> None:
    context, post = enter("live"), Post()
    effect = abreast.effect("email.send", 1)
    async with effect as scope:
        await scope.run(post.send, "a")
        await scope.run(post.send, "b")
    await effect.run(post.send, "c")
    await effect.run(post.send, "d")

    assert len(get_records(context)) == 3


async def test_effect_block_without_a_decision_raises(enter: Any) -> None:
    enter("live")

    with pytest.raises(EffectError, match=r"the block of effect 'email.send' uses neither"):
        async with abreast.effect("email.send", {}):
            pass
    with pytest.raises(EffectError, match="shadow requests run it too"), abreast.effect("email.send", {}):
        pass


async def test_effect_block_without_a_decision_is_logged_in_production(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PYTEST_VERSION")
    report_error._logged.clear()
    async with abreast.effect("email.send", {}):
        pass

    assert "uses neither" in caplog.text


async def test_effect_shared_by_requests_ends_separately() -> None:
    """The block that begins first ends first, and fails."""
    shared, failed = abreast.effect("email.send"), asyncio.Event()
    contexts = {role: RequestContext("new", role, "pair", "", Sink(), 0) for role in ("live", "shadow")}

    async def first() -> None:
        CURRENT_CONTEXT.set(contexts["live"])
        with contextlib.suppress(OSError):
            async with shared as scope:
                await asyncio.sleep(0)
                assert scope.should_execute
                raise OSError
        failed.set()

    async def second() -> None:
        CURRENT_CONTEXT.set(contexts["shadow"])
        with shared as scope:
            assert not scope.should_execute
            await failed.wait()

    await asyncio.gather(first(), second())

    assert [record.get("error") for record in get_records(contexts["live"])] == ["OSError"]
    assert [record.get("error") for record in get_records(contexts["shadow"])] == [None]


async def test_effect_block_raises_its_original_error(enter: Any) -> None:
    enter("live")
    with pytest.raises(KeyError):
        async with abreast.effect("email.send", {}):
            raise KeyError


async def test_effect_rejects_generators_and_call_of_a_coroutine_function() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(EffectError, match="is a generator"):
        abreast.effect("x")(numbers)
    with pytest.raises(EffectError, match="must be awaited"):
        abreast.effect("x").call(Post().send, "a@b")


async def _later(*_args: object) -> None: ...


@pytest.mark.parametrize("arguments", [{"payload": _later}, {"stand_in": _later}])
def test_effect_rejects_coroutine_functions_as_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(EffectError, match=r"_later must be awaited; use a plain function for effect 'email.send'"):
        abreast.effect("email.send", **arguments)


def test_effect_decorator_keeps_name_and_docstring() -> None:
    @abreast.effect("x")
    def send_it() -> None:
        """Send a mail."""

    assert (send_it.__name__, send_it.__doc__) == ("send_it", "Send a mail.")


async def test_effect_keeps_types() -> None:
    """Types are checked by mypy. Without a stand-in, the result may be None."""

    @abreast.effect("x", stand_in=Receipt("none"))
    async def decorated_async(to: str, *, text: str = "") -> Receipt:
        return Receipt(to + text)

    @abreast.effect("x")
    def decorated(to: str) -> int:
        return len(to)

    assert_type(await decorated_async("a", text="b"), Receipt)
    assert_type(decorated("a"), int | None)
    assert_type(abreast.effect("x", stand_in="s").call(len, "abc"), int | str)
    assert_type(await abreast.effect("x", stand_in=Receipt).run(decorated_async, "a"), Receipt)
    with pytest.raises(TypeError):
        await decorated_async(7)  # type: ignore[arg-type]


def test_record_never_raises(enter: Any, caplog: pytest.LogCaptureFixture) -> None:
    context = enter("live")

    class Awful:
        def model_dump(self, **_: object) -> None:
            raise ZeroDivisionError

    report_error._logged.clear()
    abreast.record("a", Awful())
    assert abreast.effect("b", lambda: 1 / 0).call(lambda: 7) == 7

    assert "recording failed in building the payload of an effect" in caplog.text
    first, second = (record["payload"] for record in get_records(context))
    assert first.startswith("<test_record_never_raises")
    assert second == "<no payload: ZeroDivisionError>"


def test_internal_error_of_the_log_does_not_reach_the_app(
    enter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise KeyError

    context = enter("live")
    monkeypatch.setattr(context.ensure_effect_log(), "add", broken)
    abreast.record("email.send")

    assert abreast.effect("email.send").call(len, "abc") == 3
    assert "recording an effect" in caplog.text


def test_record_copies_the_payload(enter: Any) -> None:
    context, payload = enter("live"), {"to": ["a"]}
    abreast.record("mail", payload)
    payload["to"].append("b")

    assert get_records(context)[0]["payload"] == {"to": ["a"]}


def test_effect_log_counts_effects_over_the_limit(enter: Any) -> None:
    context = enter("live")
    for number in range(MAX_EFFECTS + 3):
        abreast.record("mail", number)
    effects_in_capture, dropped_count = context.close_effect_log(REDACTOR.redact_payload)

    assert (len(effects_in_capture), dropped_count, context.sink.count) == (MAX_EFFECTS, 3, 0)


def test_effect_log_keeps_digests_of_payloads_over_the_limit(enter: Any) -> None:
    context, long_payload = enter("live"), "x" * MAX_PAYLOAD_BYTES
    abreast.record("mail", long_payload)
    abreast.record("mail", "short")
    abreast.record("mail", long_payload + "y")
    first, second, third = get_records(context)

    assert second["payload"] == "short"
    assert (first["length"], third["length"]) == (MAX_PAYLOAD_BYTES + 2, MAX_PAYLOAD_BYTES + 3)
    assert first["digest"] != third["digest"]
    assert "payload" not in first


def test_record_after_the_capture_counts_as_late(enter: Any) -> None:
    context = enter("live")
    abreast.record("mail", 1)
    context.close_effect_log(REDACTOR.redact_payload)
    abreast.record("mail", 2)
    empty = enter("live")
    empty.close_effect_log(REDACTOR.redact_payload)
    abreast.record("mail", 3)

    assert (context.sink.count, empty.sink.count) == (1, 1)
    assert len(get_records(context)) == 1


def test_redactor_hashes_secrets_at_any_depth_of_a_payload(enter: Any) -> None:
    context = enter("live")
    abreast.record(
        "http.post",
        {
            "user": "u",
            "Password": "hunter2",
            "nested": [{"accessToken": "hunter2"}, {"card_number": 4111, "cvv": None}],
            "x-api-key": {"deep": "hunter2"},
        },
    )
    (effect,) = get_records(context)
    payload = effect["payload"]

    assert payload["user"] == "u"
    assert payload["Password"] == payload["nested"][0]["accessToken"] == REDACTOR.hash("hunter2")
    assert payload["nested"][1] == {"card_number": REDACTOR.hash("int 4111"), "cvv": None}
    assert payload["x-api-key"].startswith("hmac:")


def test_record_from_threads_keeps_all_effects(enter: Any) -> None:
    context = enter("live")
    ready = threading.Barrier(8)

    def work() -> None:
        CURRENT_CONTEXT.set(context)
        ready.wait()
        for number in range(20):
            abreast.record("mail", number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(get_records(context)) == 160


Point = namedtuple("Point", "x y")  # noqa: PYI024  # user code may have them


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1.50"), b'"1.50"'),
        ({"b", "a"}, b'["a","b"]'),
        (b"raw \xff", b'"raw \\\\xff"'),
        (Point(1, 2), b"[1,2]"),
        (OrderedDict(a=1), b'{"a":1}'),
        (uuid.UUID(int=0), b'"00000000-0000-0000-0000-000000000000"'),
        (dt.date(2026, 1, 2), b'"2026-01-02"'),
        (Receipt("r"), b'{"id":"r"}'),
        (2**70, b'"1180591620717411303424"'),
        ([2**70, Receipt("r"), dt.date(2026, 1, 2), {1: {2}}], None),
        ("\ud800", b'"\\\\ud800"'),
        ({1: 2}, b'{"1":2}'),
        (object(), b'"<object>"'),
        (functools.partial(int), b'"<partial>"'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_to_json_converts_any_value_deterministically(value: Any, text: bytes | None) -> None:
    assert to_json(value) == (text or b'["1180591620717411303424",{"id":"r"},"2026-01-02",{"1":[2]}]')


def test_to_json_stops_at_a_circular_reference() -> None:
    circle: list[Any] = []
    circle.append(circle)

    assert b"too deep" in to_json(circle)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.decimals(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=20,
)


@settings(max_examples=50)
@given(VALUES)
def test_to_json_never_raises(value: Any) -> None:
    to_json(value)


async def test_record_separates_concurrent_requests() -> None:
    async def request(name: str) -> RequestContext:
        context = RequestContext("new", "live", name, "", Sink(), 0)
        CURRENT_CONTEXT.set(context)
        await asyncio.sleep(0)
        abreast.record("mail", name)
        return context

    requests = await asyncio.gather(*(asyncio.create_task(request(name)) for name in "abc"))

    assert [[record["payload"] for record in get_records(context)] for context in requests] == [["a"], ["b"], ["c"]]


def test_to_json_ignores_insertion_order() -> None:
    """Only digests of long payloads are compared."""
    assert to_json({"a": 1, "b": {1, 2}}) == to_json({"b": {2, 1}, "a": 1})
    assert to_json({"b": 2**70, "a": 1}) == to_json({"a": 1, "b": 2**70})


def test_to_json_uses_the_type_if_model_dump_fails() -> None:
    class Order:
        def model_dump(self, **_options: object) -> object:
            raise KeyError("id")

    assert to_json({"order": Order()}).startswith(b'{"order":"<')
    assert to_json([2**70, Order()]).startswith(b'["1180591620717411303424","<')
