"""The examples of docs/database.md and docs/cache.md run as they are, except for addresses."""

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


def read_example(page: str, name: str) -> str:
    match = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert match, f"docs/{page}.md has no example {name}"
    return match[1]


def run_example(source: str, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> dict[str, Any]:
    monkeypatch.setenv("ABREAST_REDIS_URL", redis_url)
    names: dict[str, Any] = {}
    exec(compile(source, "docs", "exec"), names)  # noqa: S102  # an example of this repository
    return names


async def run_lifespan(app: Any, during: Any) -> None:
    """Start the app, await `during()`, and stop the app, as a server does."""
    started, stopping = asyncio.Event(), asyncio.Event()
    messages = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive() -> dict[str, str]:
        kind = next(messages)
        if kind.endswith("shutdown"):
            await stopping.wait()
        return {"type": kind}

    async def send(message: dict[str, Any]) -> None:
        assert message["type"].endswith("complete"), message
        started.set()

    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
    await asyncio.wait({task, asyncio.create_task(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
    try:
        await during()
    finally:
        stopping.set()
        await task


@pytest.mark.parametrize("name", ["psycopg", "sqlalchemy"])
async def test_database_docs_example_commits_only_orders_of_users(
    name: str, postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create table placed (id integer primary key, quantity integer not null)")
    source = read_example("database", name).replace("//127.0.0.1/shop", postgres_url.partition(":")[2])
    names = run_example(source, monkeypatch, redis_url)

    async def orders() -> None:
        for scope in (
            sampled("/orders/1", "POST"),
            sampled("/orders/2", "POST", version="new", role="shadow"),
            http_scope("/orders/3", "POST"),
        ):
            messages, error = await call(names["app"], scope)
            assert (messages[0]["status"], error) == (200, None)
        await asyncio.gather(*CLEANUP_TASKS)

    await run_lifespan(names["app"], orders)
    if "engine" in names:
        await names["engine"].dispose()

    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("select id from placed order by id").fetchall() == [(1,), (3,)]


async def test_cache_docs_example_writes_only_for_users(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_example("cache", "cache").replace("redis://127.0.0.1:6379/1", redis_url)
    names = run_example(source, monkeypatch, redis_url)
    keys = []

    async def requests() -> None:
        with redis.Redis.from_url(redis_url) as client:
            for scope in (
                sampled("/products/7", version="new", role="shadow"),
                sampled("/products/7"),
                sampled("/products/7", "PUT", version="new", role="shadow"),
                sampled("/products/7", "PUT"),
            ):
                messages, error = await call(names["app"], scope)
                assert (messages[0]["status"], error) == (200, None)
                keys.append(list(client.scan_iter("shop:*")))

    await run_lifespan(names["app"], requests)

    assert keys == [[], [b"shop:product:7"], [b"shop:product:7"], []]
