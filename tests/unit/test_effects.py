"""Effects: done and recorded for users, recorded and held back for shadows."""

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
from abreast import effects as outlived
from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext
from abreast.effect_log import MAX_EFFECTS, MAX_PAYLOAD_BYTES, to_json
from abreast.effects import report_error
from abreast.errors import EffectError
from abreast.export.redaction import Redactor
from abreast.protocol.capture import Role

REDACTOR = Redactor(b"key")


class Sink:
    def __init__(self) -> None:
        self.count = 0

    def count_late_effect(self) -> None:
        self.count += 1


@dataclass
class Receipt:
    id: str


class Post:
    """What must not be done twice."""

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
        now = RequestContext("new", role, "pair", "", Sink(), 0)
        tokens.append(CURRENT_CONTEXT.set(now))
        return now

    yield begin
    if tokens:
        CURRENT_CONTEXT.set(NO_REQUEST)


def records(now: RequestContext) -> list[dict[str, Any]]:
    found, _ = now.close_effect_log(REDACTOR.redact_payload)
    return [{name: value for name, value in record.items() if name != "at_us"} for record in found]


async def by_run(post: Post) -> Any:
    held = abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none"))
    return await held.run(post.send, "a@b")


async def by_lambda(post: Post) -> Any:
    held = abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none"))
    return await held.run(lambda: post.send("a@b"))


async def by_call(post: Post) -> Any:
    held = abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none"))
    return held.call(post.send_now, "a@b")


async def by_block(post: Post) -> Any:
    async with abreast.effect("email.send", {"to": "a@b"}, stand_in=Receipt("none")) as held:
        return await held.run(post.send, "a@b")


async def by_asking(post: Post) -> Any:
    async with abreast.effect("email.send", {"to": "a@b"}) as held:
        if held.should_execute:
            return await post.send("a@b")
        return Receipt("none")


async def by_asking_in_sync_code(post: Post) -> Any:
    with abreast.effect("email.send", {"to": "a@b"}) as held:
        return post.send_now("a@b") if held.should_execute else Receipt("none")


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


FORMS = [by_run, by_lambda, by_call, by_block, by_asking, by_asking_in_sync_code, by_decorator, by_sync_decorator]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@forms
async def test_a_user_s_request_does_it_and_records_it(form: Any, enter: Any) -> None:
    now, post = enter("live"), Post()

    assert await form(post) == Receipt("real hi")
    assert post.sent == ["a@b"]
    assert records(now) == [{"kind": "email.send", "payload": {"to": "a@b"}}]


@forms
@pytest.mark.parametrize("role", ["shadow", "baseline"])
async def test_a_copy_records_it_and_goes_on_with_the_stand_in(form: Any, role: Role, enter: Any) -> None:
    now, post = enter(role), Post()

    assert await form(post) == Receipt("none")
    assert post.sent == []
    assert records(now) == [{"kind": "email.send", "payload": {"to": "a@b"}}]


@forms
async def test_outside_a_sampled_request_it_is_simply_done(form: Any) -> None:
    post = Post()

    assert await form(post) == Receipt("real hi")
    assert post.sent == ["a@b"]


async def test_a_copy_that_is_not_captured_does_it_no_more(enter: Any) -> None:
    enter("live")
    CURRENT_CONTEXT.set(RequestContext("new", "shadow", "pair", ""))
    post = Post()

    assert await by_run(post) == Receipt("none")
    assert post.sent == []


def test_work_that_long_outlives_a_shadow_is_told_once(
    enter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a consumer that the first request started for all."""
    monkeypatch.setattr(outlived, "WARNED_NAMES", set())
    held = abreast.effect("email.send")
    for role, answered, seconds in (
        ("shadow", True, 1),
        ("shadow", False, 90),
        ("live", True, 90),
        ("shadow", True, 90),
        ("shadow", True, 91),
    ):
        now = enter(role)
        now.response_sent, now.started_ns = answered, time.perf_counter_ns() - seconds * 10**9
        held.call(len, "abc")

    told = "effect 'email.send' is held back 90 s after its shadow request"
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [told]


async def test_what_it_raises_passes_and_is_recorded(enter: Any) -> None:
    now, post = enter("live"), Post()
    effect = abreast.effect("email.send", None)

    with pytest.raises(OSError, match="full"):
        await effect.run(post.send, "nobody", text="full")
    with pytest.raises(OSError, match="full"):
        effect.call(post.send_now, "nobody", text="full")
    with pytest.raises(OSError, match="full"):
        async with effect as held:
            await held.run(post.send, "nobody", "full")
    with pytest.raises(OSError, match="full"), effect as held:
        held.call(post.send_now, "nobody", "full")

    assert [record["error"] for record in records(now)] == ["OSError"] * 4


async def test_without_a_payload_it_is_the_arguments(enter: Any) -> None:
    now = enter("shadow")

    class Mailer:
        @abreast.effect("email.send")
        async def send(self, to: str, text: str = "hi", **more: int) -> None: ...

    await Mailer().send("a@b", urgent=1)
    await abreast.effect("email.send").run(Post().send, "a@b")

    assert [record["payload"] for record in records(now)] == [
        {"to": "a@b", "text": "hi", "more": {"urgent": 1}},
        {"to": "a@b", "text": "hi"},
    ]


async def test_a_stand_in_is_made_of_the_arguments(enter: Any) -> None:
    enter("shadow")
    effect = abreast.effect("email.send", stand_in=lambda to, text="hi": Receipt(f"{to} {text}"))

    assert await effect.run(Post().send, "a@b", "ho") == Receipt("a@b ho")


async def test_a_block_that_asks_twice_is_one_effect_and_two_calls_are_two(enter: Any) -> None:
    now, post = enter("live"), Post()
    effect = abreast.effect("email.send", 1)
    async with effect as held:
        await held.run(post.send, "a")
        await held.run(post.send, "b")
    await effect.run(post.send, "c")
    await effect.run(post.send, "d")

    assert len(records(now)) == 3


async def test_a_block_that_forgot_to_ask_is_told_so(enter: Any) -> None:
    enter("live")

    with pytest.raises(EffectError, match=r"the block of effect 'email.send' uses neither"):
        async with abreast.effect("email.send", {}):
            pass
    with pytest.raises(EffectError, match="shadow requests run it too"), abreast.effect("email.send", {}):
        pass


async def test_in_production_a_forgotten_question_is_logged_and_users_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PYTEST_VERSION")
    report_error._logged.clear()
    async with abreast.effect("email.send", {}):
        pass

    assert "uses neither" in caplog.text


async def test_an_effect_that_requests_share_ends_for_each_by_itself() -> None:
    """The one that began first ends first, and fails."""
    shared, failed = abreast.effect("email.send"), asyncio.Event()
    made = {role: RequestContext("new", role, "pair", "", Sink(), 0) for role in ("live", "shadow")}

    async def first() -> None:
        CURRENT_CONTEXT.set(made["live"])
        with contextlib.suppress(OSError):
            async with shared as held:
                await asyncio.sleep(0)
                assert held.should_execute
                raise OSError
        failed.set()

    async def second() -> None:
        CURRENT_CONTEXT.set(made["shadow"])
        with shared as held:
            assert not held.should_execute
            await failed.wait()

    await asyncio.gather(first(), second())

    assert [record.get("error") for record in records(made["live"])] == ["OSError"]
    assert [record.get("error") for record in records(made["shadow"])] == [None]


async def test_the_error_of_a_block_is_not_hidden_by_ours(enter: Any) -> None:
    enter("live")
    with pytest.raises(KeyError):
        async with abreast.effect("email.send", {}):
            raise KeyError


async def test_what_can_t_be_held_back_is_refused_where_it_is_written() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(EffectError, match="is a generator"):
        abreast.effect("x")(numbers)
    with pytest.raises(EffectError, match="must be awaited"):
        abreast.effect("x").call(Post().send, "a@b")


async def _later(*_given: object) -> None: ...


@pytest.mark.parametrize("wrong", [{"payload": _later}, {"stand_in": _later}])
def test_what_would_have_to_be_awaited_is_refused_where_it_is_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(EffectError, match=r"_later must be awaited; use a plain function for effect 'email.send'"):
        abreast.effect("email.send", **wrong)


def test_a_decorated_function_keeps_its_name() -> None:
    @abreast.effect("x")
    def send_it() -> None:
        """Say why."""

    assert (send_it.__name__, send_it.__doc__) == ("send_it", "Say why.")


async def test_types_survive() -> None:
    """Checked by mypy: without a stand-in the result may be None."""

    @abreast.effect("x", stand_in=Receipt("none"))
    async def one(to: str, *, text: str = "") -> Receipt:
        return Receipt(to + text)

    @abreast.effect("x")
    def two(to: str) -> int:
        return len(to)

    assert_type(await one("a", text="b"), Receipt)
    assert_type(two("a"), int | None)
    assert_type(abreast.effect("x", stand_in="s").call(len, "abc"), int | str)
    assert_type(await abreast.effect("x", stand_in=Receipt).run(one, "a"), Receipt)
    with pytest.raises(TypeError):
        await one(7)  # type: ignore[arg-type]


def test_recording_never_raises(enter: Any, caplog: pytest.LogCaptureFixture) -> None:
    now = enter("live")

    class Awful:
        def model_dump(self, **_: object) -> None:
            raise ZeroDivisionError

    report_error._logged.clear()
    abreast.record("a", Awful())
    assert abreast.effect("b", lambda: 1 / 0).call(lambda: 7) == 7

    assert "recording failed in building the payload of an effect" in caplog.text
    first, second = (record["payload"] for record in records(now))
    assert first.startswith("<test_recording_never_raises")
    assert second == "<no payload: ZeroDivisionError>"


def test_a_fault_of_ours_reaches_no_code(
    enter: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_given: Any, **_how: Any) -> None:
        raise KeyError

    now = enter("live")
    monkeypatch.setattr(now.ensure_effect_log(), "add", broken)
    abreast.record("email.send")

    assert abreast.effect("email.send").call(len, "abc") == 3
    assert "recording an effect" in caplog.text


def test_a_payload_is_what_it_was_when_it_was_recorded(enter: Any) -> None:
    now, payload = enter("live"), {"to": ["a"]}
    abreast.record("mail", payload)
    payload["to"].append("b")

    assert records(now)[0]["payload"] == {"to": ["a"]}


def test_effects_beyond_the_bound_are_counted(enter: Any) -> None:
    now = enter("live")
    for number in range(MAX_EFFECTS + 3):
        abreast.record("mail", number)
    kept, dropped = now.close_effect_log(REDACTOR.redact_payload)

    assert (len(kept), dropped, now.sink.count) == (MAX_EFFECTS, 3, 0)


def test_of_payloads_beyond_the_bound_a_digest_is_kept(enter: Any) -> None:
    now, long = enter("live"), "x" * MAX_PAYLOAD_BYTES
    abreast.record("mail", long)
    abreast.record("mail", "short")
    abreast.record("mail", long + "y")
    first, second, third = records(now)

    assert second["payload"] == "short"
    assert (first["length"], third["length"]) == (MAX_PAYLOAD_BYTES + 2, MAX_PAYLOAD_BYTES + 3)
    assert first["digest"] != third["digest"]
    assert "payload" not in first


def test_what_comes_when_the_capture_has_left_is_counted_as_late(enter: Any) -> None:
    now = enter("live")
    abreast.record("mail", 1)
    now.close_effect_log(REDACTOR.redact_payload)
    abreast.record("mail", 2)
    silent = enter("live")
    silent.close_effect_log(REDACTOR.redact_payload)
    abreast.record("mail", 3)

    assert (now.sink.count, silent.sink.count) == (1, 1)
    assert len(records(now)) == 1


def test_secrets_in_payloads_are_hashed_wherever_they_stand(enter: Any) -> None:
    now = enter("live")
    abreast.record(
        "http.post",
        {
            "user": "u",
            "Password": "hunter2",
            "nested": [{"accessToken": "hunter2"}, {"card_number": 4111, "cvv": None}],
            "x-api-key": {"deep": "hunter2"},
        },
    )
    (found,) = records(now)
    payload = found["payload"]

    assert payload["user"] == "u"
    assert payload["Password"] == payload["nested"][0]["accessToken"] == REDACTOR.hash("hunter2")
    assert payload["nested"][1] == {"card_number": REDACTOR.hash("4111"), "cvv": None}
    assert payload["x-api-key"].startswith("hmac:")


def test_threads_of_one_request_lose_nothing(enter: Any) -> None:
    now = enter("live")
    ready = threading.Barrier(8)

    def work() -> None:
        CURRENT_CONTEXT.set(now)
        ready.wait()
        for number in range(20):
            abreast.record("mail", number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(records(now)) == 160


Point = namedtuple("Point", "x y")  # noqa: PYI024  # what users have


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
def test_anything_has_a_form_that_is_the_same_in_both_versions(value: Any, text: bytes | None) -> None:
    assert to_json(value) == (text or b'["1180591620717411303424",{"id":"r"},"2026-01-02",{"1":[2]}]')


def test_a_circle_ends() -> None:
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
def test_no_payload_is_refused(value: Any) -> None:
    to_json(value)


async def test_effects_of_concurrent_requests_stay_apart() -> None:
    async def request(name: str) -> RequestContext:
        now = RequestContext("new", "live", name, "", Sink(), 0)
        CURRENT_CONTEXT.set(now)
        await asyncio.sleep(0)
        abreast.record("mail", name)
        return now

    requests = await asyncio.gather(*(asyncio.create_task(request(name)) for name in "abc"))

    assert [[record["payload"] for record in records(now)] for now in requests] == [["a"], ["b"], ["c"]]


def test_the_order_in_which_a_payload_was_filled_says_nothing() -> None:
    """Of long payloads only a digest is compared."""
    assert to_json({"a": 1, "b": {1, 2}}) == to_json({"b": {2, 1}, "a": 1})
    assert to_json({"b": 2**70, "a": 1}) == to_json({"a": 1, "b": 2**70})


def test_a_payload_whose_own_form_fails_is_recorded_by_its_type() -> None:
    class Order:
        def model_dump(self, **_options: object) -> object:
            raise KeyError("id")

    assert to_json({"order": Order()}).startswith(b'{"order":"<')
    assert to_json([2**70, Order()]).startswith(b'["1180591620717411303424","<')
