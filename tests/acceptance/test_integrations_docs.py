"""What docs/database.md and docs/cache.md show is run as it stands there, but for the addresses."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from abreast.context import CLEANUP_TASKS
from support_middleware import call, http_scope, sampled

DOCS = Path(__file__).parents[2] / "docs"


def snippet(page: str, name: str) -> str:
    found = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert found, f"docs/{page}.md has no snippet {name}"
    return found[1]


def made(source: str, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> dict[str, Any]:
    monkeypatch.setenv("ABREAST_REDIS_URL", redis_url)
    names: dict[str, Any] = {}
    exec(compile(source, "docs", "exec"), names)  # noqa: S102  # ours
    return names


async def lifespan(app: Any, during: Any) -> None:
    """Start the app, do something, and stop it, as a server does."""
    begun, over = asyncio.Event(), asyncio.Event()
    messages = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive() -> dict[str, str]:
        kind = next(messages)
        if kind.endswith("shutdown"):
            await over.wait()
        return {"type": kind}

    async def send(message: dict[str, Any]) -> None:
        assert message["type"].endswith("complete"), message
        begun.set()

    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
    await asyncio.wait({task, asyncio.create_task(begun.wait())}, return_when=asyncio.FIRST_COMPLETED)
    try:
        await during()
    finally:
        over.set()
        await task


@pytest.mark.parametrize("name", ["psycopg", "sqlalchemy"])
async def test_a_users_order_stays_and_a_shadows_does_not(
    name: str, postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create table placed (id integer primary key, quantity integer not null)")
    source = snippet("database", name).replace("//127.0.0.1/shop", postgres_url.partition(":")[2])
    names = made(source, monkeypatch, redis_url)

    async def orders() -> None:
        for scope in (
            sampled("/orders/1", "POST"),
            sampled("/orders/2", "POST", version="new", role="shadow"),
            http_scope("/orders/3", "POST"),
        ):
            sent, raised = await call(names["app"], scope)
            assert (sent[0]["status"], raised) == (200, None)
        await asyncio.gather(*CLEANUP_TASKS)

    await lifespan(names["app"], orders)
    if "engine" in names:
        await names["engine"].dispose()

    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("select id from placed order by id").fetchall() == [(1,), (3,)]


async def test_users_keep_and_delete_and_shadows_do_not(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = snippet("cache", "cache").replace("redis://127.0.0.1:6379/1", redis_url)
    names = made(source, monkeypatch, redis_url)
    kept = []

    async def requests() -> None:
        with redis.Redis.from_url(redis_url) as client:
            for scope in (
                sampled("/products/7", version="new", role="shadow"),
                sampled("/products/7"),
                sampled("/products/7", "PUT", version="new", role="shadow"),
                sampled("/products/7", "PUT"),
            ):
                sent, raised = await call(names["app"], scope)
                assert (sent[0]["status"], raised) == (200, None)
                kept.append(list(client.scan_iter("shop:*")))

    await lifespan(names["app"], requests)

    assert kept == [[], [b"shop:product:7"], [b"shop:product:7"], []]
