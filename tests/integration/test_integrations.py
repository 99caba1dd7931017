"""The integrations for httpx, aiosmtplib, redis and taskiq, against real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any

import aiosmtplib
import httpx
import pytest
from aiosmtpd.controller import Controller
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import abreast
from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext
from abreast.export.redaction import Redactor
from abreast.integrations import aiosmtplib as recording_smtp
from abreast.integrations.httpx import STAND_IN_HEADER, AsyncRecordingTransport, RecordingTransport
from abreast.integrations.redis import RecordingRedis
from abreast.protocol.capture import Role
from support import eventually_async, find_free_port
from support_middleware import serving

if TYPE_CHECKING:
    import taskiq

REDACTOR = Redactor("key")
COPIES: tuple[Role, ...] = ("shadow", "baseline")


class Sink:
    def count_late_effect(self) -> None:
        raise AssertionError


@contextmanager
def record_effects(role: Role) -> Iterator[list[dict[str, Any]]]:
    """Enter a request, and fill the list with its effects at the end."""
    context = RequestContext("new", role, f"pair-{role}", "r1", Sink(), 0)
    effects: list[dict[str, Any]] = []
    token = CURRENT_CONTEXT.set(context)
    try:
        yield effects
    finally:
        CURRENT_CONTEXT.reset(token)
        records, _ = context.close_effect_log(REDACTOR.redact_payload)
        effects += [{name: value for name, value in record.items() if name != "at_us"} for record in records]


class Bank:
    """A downstream service that lists the requests it receives."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.app = Starlette(routes=[Route("/{path:path}", self.respond, methods=["GET", "POST", "PUT", "DELETE"])])

    async def respond(self, request: Request) -> Response:
        self.requests.append(f"{request.method} {(await request.body()).decode()}".strip())
        return JSONResponse({"charged": True})


@pytest.fixture
async def bank() -> AsyncIterator[tuple[Bank, str]]:
    service = Bank()
    async with serving(service.app) as (url, _):
        yield service, url


async def test_httpx_sends_unsafe_requests_only_for_users(bank: tuple[Bank, str]) -> None:
    service, url = bank
    responses = []
    async with httpx.AsyncClient(base_url=url, transport=AsyncRecordingTransport()) as client:
        for role in ("live", *COPIES):
            with record_effects(role) as effects:
                response = await client.post("/charge?key=1", json={"amount": 5, "card_number": "4111"})
            responses.append((response.status_code, response.json(), STAND_IN_HEADER in response.headers, effects))
        outside = await client.post("/charge", json={"amount": 6})

    assert service.requests == ['POST {"amount":5,"card_number":"4111"}', 'POST {"amount":6}']
    assert outside.json() == {"charged": True}
    expected = responses[0][3]
    assert expected == [
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
    assert responses == [(200, {"charged": True}, False, expected), *[(200, {}, True, expected)] * 2]


async def test_httpx_sends_safe_requests_unless_hold_safe(bank: tuple[Bank, str]) -> None:
    service, url = bank
    async with (
        httpx.AsyncClient(base_url=url, transport=AsyncRecordingTransport()) as client,
        httpx.AsyncClient(base_url=url, transport=AsyncRecordingTransport(hold_safe=True)) as strict,
    ):
        with record_effects("shadow") as effects:
            response = await client.get("/")
            stand_in = await strict.get("/")

    assert (response.json(), stand_in.json(), service.requests) == ({"charged": True}, {}, ["GET"])
    assert [effect["kind"] for effect in effects] == ["http.get"]


async def test_httpx_sync_client_uses_the_stand_in_of_the_caller(bank: tuple[Bank, str]) -> None:
    service, url = bank

    def stand_in(request: httpx.Request) -> httpx.Response:
        return httpx.Response(201, json={"path": request.url.path})

    def work() -> list[Any]:
        with httpx.Client(base_url=url, transport=RecordingTransport(stand_in=stand_in)) as client:
            return [client.request(method, "/orders/7") for method in ("PUT", "DELETE", "GET")]

    with record_effects("shadow") as effects:
        put, delete, get = await asyncio.to_thread(work)
    await asyncio.to_thread(work)
    assert all(response.elapsed.total_seconds() >= 0 for response in (put, delete, get)), "stand-ins have a time too"

    assert [response.status_code for response in (put, delete, get)] == [201, 201, 200]
    assert put.json() == {"path": "/orders/7"}
    assert [effect["kind"] for effect in effects] == ["http.put", "http.delete"]
    assert service.requests == ["GET", "PUT", "DELETE", "GET"]


async def test_httpx_payload_parses_bodies_and_hides_credentials(bank: tuple[Bank, str]) -> None:
    _, url = bank

    async def stream() -> AsyncIterator[bytes]:
        yield b"a"

    async with httpx.AsyncClient(base_url=url, transport=AsyncRecordingTransport()) as client:
        with record_effects("live") as effects:
            await client.post("/", data={"a": "1", "token": "t"})
            await client.post("/", content=b"\xff")
            await client.post("/", content=b"[100000000000000000001]")
            await client.post("/", content=stream())
            await client.post(url.replace("http://", "http://user:secret@"))

    bodies = [effect["payload"].get("body") for effect in effects]
    assert bodies == [
        {"a": ["1"], "token": REDACTOR.hash('list ["t"]')},
        "\\xff",
        ["100000000000000000001"],
        "<streamed>",
        None,
    ]
    assert "secret" not in str(effects)


async def test_httpx_network_error_is_raised_and_recorded() -> None:
    async with httpx.AsyncClient(transport=AsyncRecordingTransport()) as client:
        with record_effects("live") as effects, pytest.raises(httpx.ConnectError):
            await client.post(f"http://127.0.0.1:{find_free_port()}/")

    assert effects[0]["error"] == "ConnectError"


class Mailbox:
    def __init__(self) -> None:
        self.recipients: list[list[str]] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802  # aiosmtpd's name
        self.recipients.append(envelope.rcpt_tos)
        return "250 accepted"


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
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = (
        "Shop <shop@example.org>",
        "Ann <ann@example.org>",
        "Your örder",
    )
    message["Bcc"] = "boss@example.org"
    message["Message-ID"] = f"<{id(message)}@example.org>"
    message.set_content(text)
    message.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="bill.pdf")
    return message


async def by_send(port: int) -> Any:
    return await recording_smtp.send(mail(), hostname="127.0.0.1", port=port)


async def by_client(port: int) -> Any:
    async with recording_smtp.SMTP(hostname="127.0.0.1", port=port) as client:
        return await client.send_message(mail())


async def by_sendmail(port: int) -> Any:
    async with recording_smtp.SMTP(hostname="127.0.0.1", port=port) as client:
        to = ["ann@example.org", "boss@example.org"]
        return await client.sendmail("shop@example.org", to, mail().as_string())


@pytest.mark.parametrize("sending", [by_send, by_client, by_sendmail])
async def test_aiosmtplib_sends_a_mail_only_for_users(
    mailbox: tuple[Mailbox, int], sending: Callable[[int], Coroutine[Any, Any, Any]]
) -> None:
    box, port = mailbox
    recorded = []
    for role in ("live", *COPIES):
        with record_effects(role) as effects:
            refused, message = await sending(port)
        recorded.append(effects)

        assert (refused, message) == ({}, "accepted" if role == "live" else "held back")

    assert [sorted(recipients) for recipients in box.recipients] == [["ann@example.org", "boss@example.org"]]
    (effect,) = recorded[0]
    assert recorded == [[effect]] * 3, "the payload is the same in each copy"
    payload = effect["payload"]
    assert (effect["kind"], payload["sender"], payload["subject"]) == ("email.send", "shop@example.org", "Your örder")
    assert payload["recipients"] == ["ann@example.org", "boss@example.org"]
    assert payload["parts"][0] == {"type": "text/plain", "text": "Thank you\n"}
    assert (payload["parts"][1]["name"], payload["parts"][1]["length"]) == ("bill.pdf", 4)


async def test_aiosmtplib_send_of_a_shadow_needs_no_server() -> None:
    with record_effects("shadow"):
        refused, _ = await by_send(find_free_port())
    with record_effects("live") as effects, pytest.raises(aiosmtplib.SMTPConnectError):
        await by_send(find_free_port())

    assert not refused
    assert effects[0]["error"] == "SMTPConnectError"


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[RecordingRedis]:
    async with RecordingRedis.from_url(redis_url, decode_responses=True) as client:
        assert isinstance(client, RecordingRedis)
        yield client


async def test_redis_holds_back_only_publishing_commands(queue: RecordingRedis) -> None:
    async def work() -> list[Any]:
        return [
            await queue.xadd("orders", {"id": "7", "token": "t"}),
            await queue.rpush("jobs", '{"job": 1}', "plain"),
            await queue.lpush("jobs", b"bytes"),
            await queue.publish("events", "hello"),
            await queue.get("nothing"),
            await queue.lrange("jobs", 0, -1),
        ]

    with record_effects("live") as live_effects:
        replies = await work()
    with record_effects("shadow") as shadow_effects:
        stand_ins = await work()

    assert replies[1:4] == [2, 3, 0]
    assert stand_ins == ["0-0", 1, 1, 0, None, replies[5]]
    assert (await queue.xlen("orders"), await queue.llen("jobs")) == (1, 3)
    assert (
        live_effects
        == shadow_effects
        == [
            {"kind": "redis.xadd", "key": "orders", "payload": {"id": 7, "token": REDACTOR.hash("t")}},
            {"kind": "redis.rpush", "key": "jobs", "payload": [{"job": 1}, "plain"]},
            {"kind": "redis.lpush", "key": "jobs", "payload": "bytes"},
            {"kind": "redis.publish", "key": "events", "payload": "hello"},
        ]
    )


@pytest.mark.parametrize("name", ["PUBLISH", "SPUBLISH", "XADD", "LPUSH", "LPUSHX", "RPUSH", "RPUSHX"])
async def test_redis_publishing_command_of_a_shadow_is_not_sent(queue: RecordingRedis, name: str) -> None:
    await queue.rpush("list", "first")
    async with queue.pubsub() as listener:
        await (listener.ssubscribe if name == "SPUBLISH" else listener.subscribe)("channel")
        await listener.get_message(timeout=5)
        target = {"XADD": "stream"}.get(name, "channel" if name.endswith("PUBLISH") else "list")
        values = ("*", "a", "b") if name == "XADD" else ("value",)
        with record_effects("shadow") as effects:
            await queue.execute_command(name, target, *values)
        message = await listener.get_message(timeout=0.05)

    assert message is None
    assert (await queue.llen("list"), await queue.exists("stream")) == (1, 0)
    assert [effect["kind"] for effect in effects] == [f"redis.{name.lower()}"]


@pytest.mark.parametrize("transaction", [True, False])
async def test_redis_pipeline_keeps_the_order_of_replies(queue: RecordingRedis, transaction: bool) -> None:
    async def work() -> list[Any]:
        async with queue.pipeline(transaction=transaction) as typed_pipe:
            pipe: Any = typed_pipe  # the types of redis-py make every command awaitable
            pipe.publish("events", "a").get("nothing").rpush("jobs", "b").echo("c").xadd("orders", {"d": "e"})
            replies: list[Any] = await pipe.execute()
            return replies

    with record_effects("live") as live_effects:
        replies = await work()
    with record_effects("shadow") as shadow_effects:
        stand_ins = await work()

    assert replies[:4] == [0, None, 1, "c"]
    assert stand_ins == [0, None, 1, "c", "0-0"]
    assert (await queue.llen("jobs"), await queue.xlen("orders")) == (1, 1)
    assert live_effects == shadow_effects
    assert [effect["kind"] for effect in live_effects] == ["redis.publish", "redis.rpush", "redis.xadd"]


async def test_redis_pipeline_with_only_stand_ins_or_watch(queue: RecordingRedis) -> None:
    with record_effects("shadow") as effects:
        async with queue.pipeline() as typed_pipe:
            pipe: Any = typed_pipe
            first = await pipe.rpush("jobs", "a").execute()
            empty = await pipe.execute()
            pipe.rpush("jobs", "discarded")
            await pipe.reset()
            await pipe.watch("jobs")
            immediate = await pipe.rpush("jobs", "b")
            pipe.multi()
            pipe.rpush("jobs", "c").llen("jobs")
            mixed = await pipe.execute()

    assert (first, empty, immediate, mixed) == ([1], [], 1, [1, 0])
    assert [effect["payload"] for effect in effects] == ["a", "b", "c"]


async def test_taskiq_worker_runs_task_in_the_role_of_its_sender(redis_url: str) -> None:
    from taskiq_redis import ListQueueBroker  # imports aiohttp, which every test process would pay for

    from abreast.integrations.taskiq import RoleMiddleware

    contexts: dict[str, abreast.RequestContext] = {}
    broker = ListQueueBroker(redis_url).with_middlewares(RoleMiddleware())

    @broker.task("work")
    async def work(name: str) -> None:
        contexts[name] = abreast.current()

    @broker.task("sync")
    def sync(name: str) -> None:
        contexts[name] = abreast.current()

    await broker.startup()
    with record_effects("shadow") as effects:
        await work.kiq("async shadow")
        await sync.kiq("sync shadow")
    with record_effects("live"):
        await work.kiq("live")
    await work.kiq("outside")

    async def is_done() -> bool:
        return len(contexts) == 4

    await run_worker(broker, is_done)

    assert {name: (context.role, context.pair, context.is_captured) for name, context in contexts.items()} == {
        "async shadow": ("shadow", "pair-shadow", False),
        "sync shadow": ("shadow", "pair-shadow", False),
        "live": ("live", "pair-live", False),
        "outside": ("live", "", False),
    }
    assert [(effect["kind"], effect["key"], effect["payload"]["args"]) for effect in effects] == [
        ("task.send", "work", ["async shadow"]),
        ("task.send", "sync", ["sync shadow"]),
    ]


async def run_worker(broker: taskiq.AsyncBroker, is_done: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Run a worker until the condition is true."""
    from taskiq.receiver import Receiver

    stop = asyncio.Event()
    worker = asyncio.create_task(Receiver(broker, run_startup=False).listen(stop))
    try:
        await eventually_async(is_done, description="the worker runs all tasks")
    finally:
        stop.set()
        await worker
        await broker.shutdown()


async def test_taskiq_in_memory_broker_keeps_the_context_of_the_request() -> None:
    from taskiq import InMemoryBroker

    from abreast.integrations.taskiq import RoleMiddleware

    broker = InMemoryBroker(await_inplace=True).with_middlewares(RoleMiddleware())

    @broker.task("work")
    async def work() -> bool:
        abreast.record("inside")
        return abreast.is_shadow()

    with record_effects("shadow") as effects:
        task = await work.kiq()
        abreast.record("after")

    assert (await task.wait_result()).return_value is True
    assert [effect["kind"] for effect in effects] == ["task.send", "inside", "after"]


@pytest.mark.parametrize("carrier", ["nonsense", "[]", '["new","later","p","r"]', "7"])
async def test_extract_of_an_invalid_carrier_is_a_shadow(carrier: str, caplog: pytest.LogCaptureFixture) -> None:
    token = CURRENT_CONTEXT.set(NO_REQUEST)
    abreast.extract(carrier)
    is_invalid_shadow = abreast.is_shadow()
    abreast.extract("")
    CURRENT_CONTEXT.reset(token)

    assert is_invalid_shadow
    assert "can't be read" in caplog.text
    assert not abreast.is_shadow()
