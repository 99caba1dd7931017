"""The ready-made effects, against the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from typing import Any

import aiosmtplib
import httpx
import pytest
import taskiq
from aiosmtpd.controller import Controller
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from taskiq.receiver import Receiver
from taskiq_redis import ListQueueBroker

import abreast
from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext
from abreast.export.redaction import Redactor
from abreast.integrations import aiosmtplib as guarded_smtp
from abreast.integrations.httpx import STAND_IN_HEADER, GuardedAsyncTransport, GuardedTransport
from abreast.integrations.redis import GuardedRedis
from abreast.integrations.taskiq import RoleMiddleware
from abreast.protocol.capture import Role
from support import eventually_async, find_free_port
from support_middleware import serving

REDACTOR = Redactor(b"key")
COPIES: tuple[Role, ...] = ("shadow", "baseline")


class Sink:
    def count_late_effect(self) -> None:
        raise AssertionError


@contextmanager
def being(role: Role) -> Iterator[list[dict[str, Any]]]:
    """What the block records."""
    now = RequestContext("new", role, f"pair-{role}", "r1", Sink(), 0)
    found: list[dict[str, Any]] = []
    token = CURRENT_CONTEXT.set(now)
    try:
        yield found
    finally:
        CURRENT_CONTEXT.reset(token)
        records, _ = now.close_effect_log(REDACTOR.redact_payload)
        found += [{name: value for name, value in record.items() if name != "at_us"} for record in records]


class Bank:
    """Another service: counts what reaches it."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "PUT", "DELETE"])])

    async def answer(self, request: Request) -> Response:
        self.reached.append(f"{request.method} {(await request.body()).decode()}".strip())
        return JSONResponse({"charged": True})


@pytest.fixture
async def bank() -> AsyncIterator[tuple[Bank, str]]:
    made = Bank()
    async with serving(made.app) as (url, _):
        yield made, url


async def test_an_unsafe_request_is_made_for_users_and_held_back_in_copies(bank: tuple[Bank, str]) -> None:
    service, url = bank
    seen = []
    async with httpx.AsyncClient(base_url=url, transport=GuardedAsyncTransport()) as client:
        for role in ("live", *COPIES):
            with being(role) as found:
                answer = await client.post("/charge?key=1", json={"amount": 5, "card_number": "4111"})
            seen.append((answer.status_code, answer.json(), STAND_IN_HEADER in answer.headers, found))
        outside = await client.post("/charge", json={"amount": 6})

    assert service.reached == ['POST {"amount":5,"card_number":"4111"}', 'POST {"amount":6}']
    assert outside.json() == {"charged": True}
    effects = seen[0][3]
    assert effects == [
        {
            "kind": "http.post",
            "key": "127.0.0.1",
            "payload": {
                "url": f"{url}/charge",
                "query": {"key": ["1"]},
                "content_type": "application/json",
                "body": {"amount": 5, "card_number": REDACTOR.hash("4111")},
            },
        }
    ]
    assert seen == [(200, {"charged": True}, False, effects), *[(200, {}, True, effects)] * 2]


async def test_safe_requests_pass_unless_they_are_held_too(bank: tuple[Bank, str]) -> None:
    service, url = bank
    async with (
        httpx.AsyncClient(base_url=url, transport=GuardedAsyncTransport()) as client,
        httpx.AsyncClient(base_url=url, transport=GuardedAsyncTransport(hold_safe=True)) as strict,
    ):
        with being("shadow") as found:
            passed = await client.get("/")
            held = await strict.get("/")

    assert (passed.json(), held.json(), service.reached) == ({"charged": True}, {}, ["GET"])
    assert [effect["kind"] for effect in found] == ["http.get"]


async def test_the_sync_client_and_a_stand_in_of_the_caller(bank: tuple[Bank, str]) -> None:
    service, url = bank

    def stand_in(request: httpx.Request) -> httpx.Response:
        return httpx.Response(201, json={"path": request.url.path})

    def work() -> list[Any]:
        with httpx.Client(base_url=url, transport=GuardedTransport(stand_in=stand_in)) as client:
            return [client.request(method, "/orders/7") for method in ("PUT", "DELETE", "GET")]

    with being("shadow") as found:
        put, delete, get = await asyncio.to_thread(work)
    await asyncio.to_thread(work)
    assert all(answer.elapsed.total_seconds() < 5 for answer in (put, delete, get)), "it can be asked as always"

    assert [answer.status_code for answer in (put, delete, get)] == [201, 201, 200]
    assert put.json() == {"path": "/orders/7"}
    assert [effect["kind"] for effect in found] == ["http.put", "http.delete"]
    assert service.reached == ["GET", "PUT", "DELETE", "GET"]


async def test_what_is_sent_is_recorded_in_a_form_that_can_be_compared(bank: tuple[Bank, str]) -> None:
    _, url = bank

    async def stream() -> AsyncIterator[bytes]:
        yield b"a"

    async with httpx.AsyncClient(base_url=url, transport=GuardedAsyncTransport()) as client:
        with being("live") as found:
            await client.post("/", data={"a": "1", "token": "t"})
            await client.post("/", content=b"\xff")
            await client.post("/", content=b"[100000000000000000001]")
            await client.post("/", content=stream())
            await client.post(url.replace("http://", "http://user:secret@"))

    bodies = [effect["payload"].get("body") for effect in found]
    assert bodies == [
        {"a": ["1"], "token": REDACTOR.hash('["t"]')},
        "\\xff",
        ["100000000000000000001"],
        "<streamed>",
        None,
    ]
    assert "secret" not in str(found)


async def test_an_error_of_the_network_passes_and_is_recorded() -> None:
    async with httpx.AsyncClient(transport=GuardedAsyncTransport()) as client:
        with being("live") as found, pytest.raises(httpx.ConnectError):
            await client.post(f"http://127.0.0.1:{find_free_port()}/")

    assert found[0]["error"] == "ConnectError"


class Mailbox:
    def __init__(self) -> None:
        self.got: list[list[str]] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802  # aiosmtpd's name
        self.got.append(envelope.rcpt_tos)
        return "250 taken"


@pytest.fixture
def mailbox() -> Iterator[tuple[Mailbox, int]]:
    box, port = Mailbox(), find_free_port()
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        yield box, port
    finally:
        controller.stop()


def mail(text: str = "Thank you") -> EmailMessage:
    made = EmailMessage()
    made["From"], made["To"], made["Subject"] = ("Shop <shop@example.org>", "Ann <ann@example.org>", "Your örder")
    made["Bcc"] = "boss@example.org"
    made["Message-ID"] = f"<{id(made)}@example.org>"
    made.set_content(text)
    made.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="bill.pdf")
    return made


async def by_send(port: int) -> Any:
    return await guarded_smtp.send(mail(), hostname="127.0.0.1", port=port)


async def by_client(port: int) -> Any:
    async with guarded_smtp.SMTP(hostname="127.0.0.1", port=port) as client:
        return await client.send_message(mail())


async def by_sendmail(port: int) -> Any:
    async with guarded_smtp.SMTP(hostname="127.0.0.1", port=port) as client:
        to = ["ann@example.org", "boss@example.org"]
        return await client.sendmail("shop@example.org", to, mail().as_string())


@pytest.mark.parametrize("sending", [by_send, by_client, by_sendmail])
async def test_a_mail_is_sent_once(
    mailbox: tuple[Mailbox, int], sending: Callable[[int], Coroutine[Any, Any, Any]]
) -> None:
    box, port = mailbox
    recorded = []
    for role in ("live", *COPIES):
        with being(role) as found:
            refused, said = await sending(port)
        recorded.append(found)

        assert (refused, said) == ({}, "taken" if role == "live" else "held back")

    assert [sorted(got) for got in box.got] == [["ann@example.org", "boss@example.org"]]
    (effect,) = recorded[0]
    assert recorded == [[effect]] * 3, "nothing in it differs from copy to copy"
    payload = effect["payload"]
    assert (effect["kind"], payload["sender"], payload["subject"]) == ("email.send", "shop@example.org", "Your örder")
    assert payload["recipients"] == ["ann@example.org", "boss@example.org"]
    assert payload["parts"][0] == {"type": "text/plain", "text": "Thank you\n"}
    assert (payload["parts"][1]["name"], payload["parts"][1]["length"]) == ("bill.pdf", 4)


async def test_a_shadow_needs_no_mail_server() -> None:
    with being("shadow"):
        refused, _ = await by_send(find_free_port())
    with being("live") as found, pytest.raises(aiosmtplib.SMTPConnectError):
        await by_send(find_free_port())

    assert not refused
    assert found[0]["error"] == "SMTPConnectError"


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[GuardedRedis]:
    async with GuardedRedis.from_url(redis_url, decode_responses=True) as client:
        assert isinstance(client, GuardedRedis)
        yield client


async def test_publishing_and_queueing_is_held_back_and_the_rest_passes(queue: GuardedRedis) -> None:
    async def work() -> list[Any]:
        return [
            await queue.xadd("orders", {"id": "7", "token": "t"}),
            await queue.rpush("jobs", '{"job": 1}', "plain"),
            await queue.lpush("jobs", b"bytes"),
            await queue.publish("events", "hello"),
            await queue.get("nothing"),
            await queue.lrange("jobs", 0, -1),
        ]

    with being("live") as first:
        real = await work()
    with being("shadow") as second:
        stood_in = await work()

    assert real[1:4] == [2, 3, 0]
    assert stood_in == ["0-0", 1, 1, 0, None, real[5]]
    assert (await queue.xlen("orders"), await queue.llen("jobs")) == (1, 3)
    assert (
        first
        == second
        == [
            {"kind": "redis.xadd", "key": "orders", "payload": {"id": 7, "token": REDACTOR.hash("t")}},
            {"kind": "redis.rpush", "key": "jobs", "payload": [{"job": 1}, "plain"]},
            {"kind": "redis.lpush", "key": "jobs", "payload": "bytes"},
            {"kind": "redis.publish", "key": "events", "payload": "hello"},
        ]
    )


@pytest.mark.parametrize("name", ["PUBLISH", "SPUBLISH", "XADD", "LPUSH", "LPUSHX", "RPUSH", "RPUSHX"])
async def test_each_command_that_tells_others_something_is_held_back(queue: GuardedRedis, name: str) -> None:
    """Seen by one who listens, and by what is there."""
    await queue.rpush("list", "first")
    async with queue.pubsub() as listener:
        await (listener.ssubscribe if name == "SPUBLISH" else listener.subscribe)("channel")
        await listener.get_message(timeout=5)
        target = {"XADD": "stream"}.get(name, "channel" if name.endswith("PUBLISH") else "list")
        what = ("*", "a", "b") if name == "XADD" else ("said",)
        with being("shadow") as found:
            await queue.execute_command(name, target, *what)
        heard = await listener.get_message(timeout=0.05)

    assert heard is None
    assert (await queue.llen("list"), await queue.exists("stream")) == (1, 0)
    assert [effect["kind"] for effect in found] == [f"redis.{name.lower()}"]


@pytest.mark.parametrize("transaction", [True, False])
async def test_a_pipeline_keeps_its_answers_in_place(queue: GuardedRedis, transaction: bool) -> None:
    async def work() -> list[Any]:
        async with queue.pipeline(transaction=transaction) as made:
            pipe: Any = made  # its types say that every command is awaited
            pipe.publish("events", "a").get("nothing").rpush("jobs", "b").echo("c").xadd("orders", {"d": "e"})
            answers: list[Any] = await pipe.execute()
            return answers

    with being("live") as first:
        real = await work()
    with being("shadow") as second:
        stood_in = await work()

    assert [real[0], real[1], real[2], real[3]] == [0, None, 1, "c"]
    assert stood_in == [0, None, 1, "c", "0-0"]
    assert (await queue.llen("jobs"), await queue.xlen("orders")) == (1, 1)
    assert first == second
    assert [effect["kind"] for effect in first] == ["redis.publish", "redis.rpush", "redis.xadd"]


async def test_a_pipeline_of_nothing_else_and_one_that_watches(queue: GuardedRedis) -> None:
    with being("shadow") as found:
        async with queue.pipeline() as made:
            pipe: Any = made
            only = await pipe.rpush("jobs", "a").execute()
            again = await pipe.execute()
            pipe.rpush("jobs", "thrown away")
            await pipe.reset()
            await pipe.watch("jobs")
            at_once = await pipe.rpush("jobs", "b")
            pipe.multi()
            pipe.rpush("jobs", "c").llen("jobs")
            both = await pipe.execute()

    assert (only, again, at_once, both) == ([1], [], 1, [1, 0])
    assert [effect["payload"] for effect in found] == ["a", "b", "c"]


async def test_work_that_a_shadow_sends_off_stays_a_shadow_s_in_the_worker(redis_url: str) -> None:
    seen: dict[str, abreast.Current] = {}
    broker = ListQueueBroker(redis_url).with_middlewares(RoleMiddleware())

    @broker.task("work")
    async def work(name: str) -> None:
        seen[name] = abreast.current()

    @broker.task("sync")
    def sync(name: str) -> None:
        seen[name] = abreast.current()

    await broker.startup()
    with being("shadow") as found:
        await work.kiq("async shadow")
        await sync.kiq("sync shadow")
    with being("live"):
        await work.kiq("live")
    await work.kiq("outside")

    async def done() -> bool:
        return len(seen) == 4

    await working(broker, done)

    assert {name: (now.role, now.pair, now.is_captured) for name, now in seen.items()} == {
        "async shadow": ("shadow", "pair-shadow", False),
        "sync shadow": ("shadow", "pair-shadow", False),
        "live": ("live", "pair-live", False),
        "outside": ("live", "", False),
    }
    assert [(effect["kind"], effect["key"], effect["payload"]["args"]) for effect in found] == [
        ("task.send", "work", ["async shadow"]),
        ("task.send", "sync", ["sync shadow"]),
    ]


async def working(broker: taskiq.AsyncBroker, done: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """A worker as taskiq runs it, until it is done."""
    stop = asyncio.Event()
    worker = asyncio.create_task(Receiver(broker, run_startup=False).listen(stop))
    try:
        await eventually_async(done, what="the worker did its work")
    finally:
        stop.set()
        await worker
        await broker.shutdown()


async def test_a_broker_within_the_process_leaves_the_request_as_it_is() -> None:
    broker = taskiq.InMemoryBroker(await_inplace=True).with_middlewares(RoleMiddleware())

    @broker.task("work")
    async def work() -> bool:
        abreast.record("inside")
        return abreast.is_shadow()

    with being("shadow") as found:
        task = await work.kiq()
        abreast.record("after")

    assert (await task.wait_result()).return_value is True
    assert [effect["kind"] for effect in found] == ["task.send", "inside", "after"]


@pytest.mark.parametrize("carried", ["nonsense", "[]", '["new","later","p","r"]', "7"])
async def test_a_role_that_can_t_be_read_is_a_shadow_s(carried: str, caplog: pytest.LogCaptureFixture) -> None:
    token = CURRENT_CONTEXT.set(NO_REQUEST)
    abreast.adopt(carried)
    unreadable = abreast.is_shadow()
    abreast.adopt("")
    CURRENT_CONTEXT.reset(token)

    assert unreadable
    assert "can't be read" in caplog.text
    assert not abreast.is_shadow()
