"""What docs/effects.md shows is run as it stands there, but for the addresses."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp
from taskiq.receiver import Receiver

import abreast
from abreast import effect_log as journal
from abreast import integrations as guards
from abreast.export import redaction as redact
from abreast.protocol.capture import Role
from support import eventually_async
from support_integrations import get_effects, in_request
from support_middleware import captures, marks, pair_id

PAGE = (Path(__file__).parents[2] / "docs" / "effects.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"the page has no snippet {name}"
    return found[1]


def run(name: str, redis_url: str, **known: Any) -> dict[str, Any]:
    code = snippet(name).replace("redis://127.0.0.1:6379/0", redis_url)
    known["__name__"] = __name__  # FastAPI and taskiq look for the module
    exec(compile(code, name, "exec", dont_inherit=True), known)  # noqa: S102  # our own page
    return known


async def ask(app: ASGIApp, **how: Any) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        answer = await client.post("/orders", params={"to": "a@b"}, headers=marks(pair_id(), **how))
    return answer.json()


async def test_the_shortest_example_sends_one_mail_and_records_two(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ABREAST_REDIS_URL", redis_url)
    app = run("shortest", redis_url)["app"]
    told = [await ask(app, version="old", role="live"), await ask(app, version="new", role="shadow")]

    async def there() -> bool:
        return len(await captures(redis_url)) == 2

    await eventually_async(there, what="both captures are sent")
    middleware = app.middleware_stack
    while not isinstance(middleware, abreast.ParallelRunMiddleware):
        middleware = middleware.app
    await middleware.aclose()

    assert told == [{"state": "ordered"}] * 2
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
async def test_all_forms_charge_a_user_and_no_shadow(
    redis_url: str, role: Role, charged: list[int], receipts: list[str]
) -> None:
    known = {"Card": Card, "Receipt": Receipt, "charge": Card.charge, "charge_now": Card.charge_now}
    made, card = run("forms", redis_url, abreast=abreast, **known), Card()
    with in_request(role) as request:
        await made["pay"](card)
        last = await made["charge_it"](card, 8)

    assert card.charged == charged
    assert last.text == ("8" if charged else "none")
    payloads = [payload for _, _, payload in get_effects(request)]
    assert payloads == [{"amount": 5}, {"amount": 6}, {"amount": 7}, {"receipts": receipts}, {"amount": 8}]


async def test_the_ready_made_ones_are_made_as_shown(redis_url: str) -> None:
    made = run("ready-made", redis_url)
    made["blocking"].close()
    await made["client"].aclose()
    assert await made["queue"].ping()
    await made["queue"].aclose()


async def test_the_recipe_for_taskiq_keeps_a_shadow_s_mail_back(redis_url: str) -> None:
    sent: list[str] = []
    done = asyncio.Event()

    async def send_mail(to: str) -> None:
        sent.append(to)
        if to == "last":
            done.set()

    made = run("taskiq", redis_url, send_mail=send_mail)
    broker, receipt = made["broker"], made["receipt"]
    await broker.startup()
    for carried, to in (('["new","shadow","p","r"]', "shadow"), ("", "user")):
        abreast.extract(carried)
        await receipt.kiq(to)
    await receipt.kiq("last")
    stop = asyncio.Event()
    worker = asyncio.create_task(Receiver(broker, run_startup=False, max_async_tasks=1).listen(stop))
    await asyncio.wait_for(done.wait(), 15)
    stop.set()
    await worker
    await broker.shutdown()

    assert sent == ["user", "last"]


def test_the_bounds_and_modules_on_the_page_are_those_of_the_code() -> None:
    assert f"may record {journal.MAX_EFFECTS} effects" in PAGE
    assert f"beyond {journal.MAX_PAYLOAD_BYTES // 1024} KiB" in PAGE
    assert {"password", "token", "card_number", "cvv"} <= redact.SECRET_FIELDS
    folder = Path(guards.__file__).parent
    named = set(re.findall(r"`abreast\.guards\.(\w+)`", PAGE))
    assert {name for name in named if (folder / f"{name}.py").exists()} == named
    assert {name for name in re.findall(r"abreast\.(\w+)\(", PAGE) if not hasattr(abreast, name)} == set()
