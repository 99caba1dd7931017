"""Tells receivers about events: what is in the outbox, until it is delivered or too old. At least once; tried again
later, a message may come after a newer one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
import structlog

from abreast_sidecar.control.traffic import MILLION, WEIGHTS
from abreast_sidecar.steer import signing
from abreast_sidecar.store.database import Database, Row

TIMEOUT = 5.0  # seconds that a receiver gets
MOST = 1000  # messages that wait for one receiver; the oldest are dropped
TRIM = 5.0  # seconds between two looks at the bounds
OLDEST = 3 * 86_400.0  # seconds after which a message is given up
BATCH = 20
SHORTEST, LONGEST = 1.0, 600.0  # seconds between two attempts

log = structlog.get_logger(__name__)


class Webhooks:
    def __init__(self, database: Database, urls: Sequence[str], secret: str) -> None:
        self._database = database
        self._urls = tuple(dict.fromkeys(urls))
        self._secret = secret
        self._registered = False
        self._trimmed = 0.0

    async def deliver(self) -> None:
        if not self._registered:
            await self._register()
        if not self._urls:
            return
        await self._trim()
        due = [await self._database.rows("webhooks_due", {"url": url, "limit": BATCH}) for url in self._urls]
        if not any(due):
            return
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client:
            await asyncio.gather(*(self._deliver_all(client, rows) for rows in due))

    async def _register(self) -> None:
        """Once in each term of the acting sidecar. From now on every event is also written for these receivers, by whichever sidecar writes it."""
        await self._database.execute("webhook_receivers_delete", {"urls": list(self._urls)})
        await self._database.execute("webhook_receivers_add", {"urls": list(self._urls)})
        self._registered = True

    async def _trim(self) -> None:
        if time.monotonic() - self._trimmed < TRIM:
            return
        self._trimmed = time.monotonic()
        for row in await self._database.rows("webhooks_trim", {"limit": MOST, "oldest": OLDEST}):
            log.error("webhooks are given up", receiver=place(row["url"]), messages=row["messages"])

    async def _deliver_all(self, client: httpx.AsyncClient, rows: Sequence[Row]) -> None:
        """Of one receiver. One that is away holds up no other; and is asked once, not for each message."""
        for row in rows:
            trouble = await self._post(client, row)
            if not trouble:
                await self._database.execute("webhook_done", {"id": row["id"]})
                continue
            wait = backoff(row["attempts"])
            await self._database.execute("webhook_retry", {"id": row["id"], "wait": wait})
            attempt = row["attempts"] + 1
            log.warning(
                "a webhook is not delivered", receiver=place(row["url"]), error=trouble, attempt=attempt
            )
            return

    async def _post(self, client: httpx.AsyncClient, row: Row) -> str:
        """What is amiss; empty for delivered."""
        body = orjson.dumps(message(row))
        signed = signing.headers(self._secret, f"msg_{row['uid']}", int(time.time()), body)
        headers = {"content-type": "application/json", "user-agent": "abreast", **signed}
        try:
            async with (
                asyncio.timeout(TIMEOUT),  # of all: a receiver may answer byte by byte
                client.stream("POST", row["url"], content=body, headers=headers) as answer,
            ):
                return "" if answer.is_success else f"it answers {answer.status_code}"  # its body is not read
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return type(error).__name__  # its text may hold the URL, and that a token


def backoff(attempts: int) -> float:
    """Seconds: twice as long each time, and never in step with others."""
    return min(SHORTEST * 2.0 ** min(attempts, 20), LONGEST) * random.uniform(0.75, 1.0)  # noqa: S311  # not a secret


def place(url: str) -> str:
    """What may be logged of it."""
    return urlsplit(url).hostname or "?"


def message(row: Row) -> dict[str, Any]:
    """The body: docs/steering.md has it field by field."""
    return {
        "type": f"traffic.{row['action']}",
        "timestamp": row["at"].isoformat(),
        "data": {
            "event_id": row["event_id"],
            "service": row["service"],
            "action": row["action"],
            "actor": row["actor"],
            "reason": row["reason"],
            "before": shares(row["before"]) if row["before"] else None,
            "after": shares(row["after"]),
            "detail": row["detail"],
        },
    }


def shares(document: Row) -> dict[str, Any]:
    """As the API has them: from 0 to 1."""
    return {
        "version": document["version"],
        "new_share": document["new_share"] / WEIGHTS,
        "sample_safe": document["sample_safe"] / MILLION,
        "sample_unsafe": document["sample_unsafe"] / MILLION,
        "baseline_share": document["baseline_share"] / MILLION,
        "rolled_back": document["rolled_back"],
    }
