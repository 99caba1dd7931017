"""The examples of docs/effects.md run as they are, except for addresses."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

import abreast
from abreast import context, integrations
from abreast.protocol.capture import Role
from support import eventually_async
from support_integrations import get_effects, in_request
from support_middleware import captures, marks, pair_id

PAGE = (Path(__file__).parents[2] / "docs" / "effects.md").read_text()


def read_example(name: str) -> str:
    match = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert match, f"docs/effects.md has no example {name}"
    return match[1]


def run_example(name: str, redis_url: str, **names: Any) -> dict[str, Any]:
    code = read_example(name).replace("redis://127.0.0.1:6379/0", redis_url)
    names["__name__"] = __name__  # FastAPI and taskiq look up the module
    exec(compile(code, name, "exec", dont_inherit=True), names)  # noqa: S102  # an example of this repository
    return names


async def post_order(app: ASGIApp, **role: Any) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        response = await client.post("/orders", params={"to": "a@b"}, headers=marks(pair_id(), **role))
    return response.json()


async def test_effects_docs_shortest_example_sends_one_mail_and_records_two(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ABREAST_REDIS_URL", redis_url)
    app = run_example("shortest", redis_url)["app"]
    responses = [await post_order(app, version="old", role="live"), await post_order(app, version="new", role="shadow")]

    async def are_captured() -> bool:
        return len(await captures(redis_url)) == 2

    await eventually_async(are_captured, description="both captures are sent")
    middleware = app.middleware_stack
    while not isinstance(middleware, abreast.ParallelRunMiddleware):
        middleware = middleware.app
    await middleware.aclose()

    assert responses == [{"state": "ordered"}] * 2
    assert capsys.readouterr().out == "mail to a@b\n"
    for capture in await captures(redis_url):
        (effect,) = capture.effects
        assert (effect["kind"], effect["payload"]) == ("email.send", {"to": "a@b", "text": "thank you"})


@dataclass
class Receipt:
    text: str


class Card:
    def __init__(self) -> None:
        self.charged: list[int] = []

    async def charge(self, amount: int) -> Receipt:
        return self.charge_now(amount)

    def charge_now(self, amount: int) -> Receipt:
        self.charged.append(amount)
        return Receipt(str(amount))


@pytest.mark.parametrize(
    ("role", "charged", "receipts"), [("live", [5, 6, 7, 8], ["5", "6"]), ("shadow", [], ["none", "none"])]
)
async def test_effects_docs_forms_charge_a_user_and_no_shadow(
    redis_url: str, role: Role, charged: list[int], receipts: list[str]
) -> None:
    names = {"Card": Card, "Receipt": Receipt, "charge": Card.charge, "charge_now": Card.charge_now}
    example, card = run_example("forms", redis_url, abreast=abreast, **names), Card()
    with in_request(role) as request:
        await example["pay"](card)
        last = await example["charge_it"](card, 8)

    assert card.charged == charged
    assert last.text == ("8" if charged else "none")
    payloads = [payload for _, _, payload in get_effects(request)]
    assert payloads == [{"amount": 5}, {"amount": 6}, {"amount": 7}, {"receipts": receipts}, {"amount": 8}]


async def test_effects_docs_integrations_are_created_as_shown(redis_url: str) -> None:
    example = run_example("integrations", redis_url)
    example["blocking"].close()
    await example["client"].aclose()
    assert await example["queue"].ping()
    await example["queue"].aclose()


async def test_effects_docs_taskiq_example_holds_back_mail_of_a_shadow(redis_url: str) -> None:
    from taskiq.receiver import Receiver

    mails: list[str] = []
    done = asyncio.Event()

    async def send_mail(to: str) -> None:
        mails.append(to)
        if to == "last":
            done.set()

    example = run_example("taskiq", redis_url, send_mail=send_mail)
    broker, receipt = example["broker"], example["receipt"]
    await broker.startup()
    for carrier, to in (('["new","shadow","p","r"]', "shadow"), ("", "user")):
        abreast.extract(carrier)
        await receipt.kiq(to)
    await receipt.kiq("last")
    stop = asyncio.Event()
    worker = asyncio.create_task(Receiver(broker, run_startup=False, max_async_tasks=1).listen(stop))
    await asyncio.wait_for(done.wait(), 15)
    stop.set()
    await worker
    await broker.shutdown()

    assert mails == ["user", "last"]


def test_effects_docs_name_limits_and_modules_of_the_code() -> None:
    assert f"may record {context.MAX_EFFECTS} effects" in PAGE
    assert f"beyond {context.MAX_PAYLOAD_BYTES // 1024} KiB" in PAGE
    folder = Path(integrations.__file__).parent
    modules = set(re.findall(r"`abreast\.integrations\.(\w+)`", PAGE))
    assert modules >= {"httpx", "aiosmtplib", "redis", "taskiq"}
    assert {name for name in modules if (folder / f"{name}.py").exists()} == modules
    assert {name for name in re.findall(r"abreast\.(\w+)\(", PAGE) if not hasattr(abreast, name)} == set()
