"""Webhooks of a running sidecar to separate receivers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from abreast.v1 import rollout_pb2 as pb
from abreast.v1 import traffic_pb2
from abreast_sidecar.rollout import webhooks
from support import eventually_async
from support_rollout import NOW, add, set_guard, set_share
from support_serve import RunningSidecar, run_sidecar

pytestmark = pytest.mark.postgres

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PAGE = (Path(__file__).parents[2] / "docs" / "rollout.md").read_text()


@dataclass
class Receiver:
    url: str = ""
    refuse: int = 0  # so many of the next messages
    deliveries: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.deliveries]

    async def wait_for_actions(self, *actions: str) -> list[dict[str, Any]]:
        async def has_actions() -> bool:
            return [message["data"]["action"] for message in self.messages] == list(actions)

        await eventually_async(has_actions, description=f"{actions} were told, so far {self.messages}")
        return self.messages


@contextmanager
def receiver() -> Iterator[Receiver]:
    instance = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the server's name for it
            body = self.rfile.read(int(self.headers["content-length"]))
            refused = instance.refuse > 0
            instance.refuse -= refused
            if not refused:
                instance.deliveries.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(503 if refused else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        instance.url = f"http://127.0.0.1:{server.server_address[1]}/hook?token=t0k3n"
        yield instance
        server.shutdown()


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as instance:
        yield instance


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str, hook: Receiver) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, webhook_urls=(hook.url,), webhook_secret=SECRET) as instance:
        ledger = instance.ledger()
        ledger.endpoint("shop")

        async def registered() -> bool:
            return bool(ledger.execute("select name from abreast.webhook_receiver"))

        await eventually_async(registered, description="the receiver is known")
        yield instance


async def rollback(sidecar: RunningSidecar) -> None:
    await sidecar.traffic.Rollback(traffic_pb2.RollbackRequest(actor="ada", reason="500s", wait=NOW))


async def metric(sidecar: RunningSidecar, name: str) -> float:
    text = (await sidecar.http.get("/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(line.split(" ")[1])


async def test_webhook_sends_each_event_once_with_signature(sidecar: RunningSidecar, hook: Receiver) -> None:
    await set_share(sidecar, 0.25)
    await rollback(sidecar)
    plan = pb.RampPlan(steps=[0.01, 1.0])
    await sidecar.rollout.StartRamp(pb.StartRampRequest(plan=plan, actor="ada", reason="again"))
    messages = await hook.wait_for_actions("update", "rollback", "ramp_start")

    headers, body = hook.deliveries[1]
    assert messages[1]["type"] == "traffic.rollback"
    assert messages[1]["data"]["before"]["new_share"] == 0.25
    assert (messages[1]["data"]["actor"], messages[1]["data"]["reason"]) == ("ada", "500s")
    assert messages[1]["data"]["after"]["rolled_back"]
    assert messages[2]["data"]["detail"]["ramp_after"]["steps"] == [100, 10_000]
    for sent_headers, sent_body in hook.deliveries:
        Webhook(SECRET).verify(sent_body, sent_headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body + b" ", headers)
    assert len({headers["webhook-id"] for headers, _ in hook.deliveries}) == 3
    assert headers["content-type"] == "application/json"


async def test_webhook_sends_events_of_a_watching_guard(sidecar: RunningSidecar, hook: Receiver) -> None:
    await set_guard(sidecar, "WATCHING")
    await set_share(sidecar, 0.5)
    add(sidecar.ledger(), 20, live="new", new_status=500)

    (*_, message) = await hook.wait_for_actions("guard_set", "update", "guard_would_roll_back")

    assert (message["data"]["actor"], message["data"]["detail"]["rule"]) == ("guard", "errors")


async def test_webhook_retries_with_the_same_id(sidecar: RunningSidecar, hook: Receiver) -> None:
    hook.refuse = 1
    await rollback(sidecar)

    await hook.wait_for_actions("rollback")

    assert await metric(sidecar, 'abreast_webhooks_total{result="failed"}') == 1
    assert await metric(sidecar, 'abreast_webhooks_total{result="delivered"}') == 1
    assert await metric(sidecar, "abreast_webhooks_waiting") == 0


async def test_webhook_outbox_survives_a_restart(redis_url: str, postgres_url: str) -> None:
    settings: dict[str, Any] = {"webhook_secret": SECRET}
    with receiver() as hook:
        hook.refuse = 10_000
        async with run_sidecar(redis_url, postgres_url, webhook_urls=(hook.url,), **settings) as first:
            ledger = first.ledger()
            ledger.endpoint("shop")

            async def registered() -> bool:
                return bool(ledger.execute("select name from abreast.webhook_receiver"))

            await eventually_async(registered, description="the receiver is known")
            await rollback(first)
        (waiting,) = ledger.execute("select count(*) from abreast.webhook_delivery")
        hook.refuse = 0
        async with run_sidecar(redis_url, postgres_url, webhook_urls=(hook.url,), **settings):
            await hook.wait_for_actions("rollback")

    assert waiting == (1,)


async def test_webhook_receiver_that_is_down_delays_no_other(redis_url: str, postgres_url: str, hook: Receiver) -> None:
    away = "http://127.0.0.1:1/"
    async with run_sidecar(redis_url, postgres_url, webhook_urls=(away, hook.url), webhook_secret=SECRET) as sidecar:
        ledger = sidecar.ledger()
        ledger.endpoint("shop")

        async def registered() -> bool:
            return len(ledger.execute("select name from abreast.webhook_receiver")) == 2

        await eventually_async(registered, description="the receivers are known")
        await rollback(sidecar)
        await set_share(sidecar, 0.5)
        await hook.wait_for_actions("rollback", "update")

        async def only_those() -> bool:
            waiting = ledger.execute("select receiver, count(*) from abreast.webhook_delivery group by receiver")
            return waiting == [(webhooks.name_receiver(away), 2)]

        await eventually_async(only_those, description="only what can't be delivered waits")


@asynccontextmanager
async def dripping(answer: bytes) -> AsyncIterator[str]:
    """Yield the URL of a receiver that begins its answer with this text, and never ends it."""

    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("answer", "waiting"),
    [(b"HTTP/1.1 200 OK\r\nx-", 2), (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n", 0)],
    ids=["its headers have no end", "its body has no end"],
)
async def test_webhook_receiver_with_an_endless_response_delays_no_other(
    redis_url: str, postgres_url: str, hook: Receiver, monkeypatch: pytest.MonkeyPatch, answer: bytes, waiting: int
) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOK_TIMEOUT_S", 0.5)
    async with (
        dripping(answer) as url,
        run_sidecar(redis_url, postgres_url, webhook_urls=(url, hook.url), webhook_secret=SECRET) as sidecar,
    ):
        ledger = sidecar.ledger()
        ledger.endpoint("shop")

        async def registered() -> bool:
            return len(ledger.execute("select name from abreast.webhook_receiver")) == 2

        await eventually_async(registered, description="the receivers are known")
        await rollback(sidecar)
        await hook.wait_for_actions("rollback")
        await set_share(sidecar, 0.5)
        await hook.wait_for_actions("rollback", "update")

        async def has_left() -> bool:
            return ledger.execute("select count(*) from abreast.webhook_delivery") == [(waiting,)]

        await eventually_async(has_left, description=f"{waiting} messages wait")


async def test_webhook_outbox_drops_the_oldest(
    sidecar: RunningSidecar, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MAX_WAITING_WEBHOOKS", 2)
    monkeypatch.setattr(webhooks, "TRIM_INTERVAL_S", 0.1)
    hook.refuse = 10_000
    for step in range(5):
        await set_share(sidecar, 0.1 + step / 10)

    async def dropped() -> bool:
        return await metric(sidecar, 'abreast_webhooks_total{result="dropped"}') == 3

    await eventually_async(dropped, description="the oldest three are dropped")
    hook.refuse = 0
    messages = await hook.wait_for_actions("update", "update")

    assert {message["data"]["after"]["new_share"] for message in messages} == {0.4, 0.5}


async def test_webhook_logs_contain_no_secret(
    sidecar: RunningSidecar, hook: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    hook.refuse = 1
    await rollback(sidecar)
    await hook.wait_for_actions("rollback")

    output = "".join(capsys.readouterr()) + repr(sidecar.sidecar.settings) + (await sidecar.http.get("/")).text
    receivers = sidecar.ledger().execute("select name from abreast.webhook_receiver")
    assert "webhook not delivered" in output
    assert [name.partition(" ")[0] for (name,) in receivers] == ["127.0.0.1"]
    assert "t0k3n" not in str(receivers)
    assert SECRET not in output
    assert "t0k3n" not in output


async def test_webhook_docs_example_verifies_a_message(sidecar: RunningSidecar, hook: Receiver) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)  # noqa: S102  # our own page
    await rollback(sidecar)
    await hook.wait_for_actions("rollback")
    headers, body = hook.deliveries[0]

    assert scope["verified"](SECRET, headers, body)
    assert not scope["verified"](SECRET, headers, body.replace(b"500s", b"5OOs"))
    assert not scope["verified"](SECRET, headers | {"webhook-timestamp": "1"}, body)


async def test_webhook_docs_message_has_the_fields_that_are_sent(sidecar: RunningSidecar, hook: Receiver) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    await set_share(sidecar, 0.25)
    await rollback(sidecar)
    (_, message) = await hook.wait_for_actions("update", "rollback")

    assert shape(json.loads(example)) == shape(message)


def shape(value: Any) -> Any:
    return {name: shape(item) for name, item in value.items()} if isinstance(value, dict) else type(value)
