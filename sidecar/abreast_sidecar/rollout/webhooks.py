"""Tells receivers about events: what is in the outbox, until it is delivered or too old. At least once; tried again
later, a message may come after a newer one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
import structlog
from standardwebhooks import Webhook

from abreast_sidecar.store.database import Database, Row
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT

WEBHOOK_TIMEOUT_S = 5.0  # seconds that a receiver gets
MAX_WAITING_WEBHOOKS = 1000  # messages that wait for one receiver; the oldest are dropped
TRIM_INTERVAL_S = 5.0  # seconds between two looks at the bounds
MAX_WEBHOOK_AGE_S = 3 * 86_400.0  # seconds after which a message is given up
DELIVERY_BATCH_SIZE = 20
MIN_RETRY_DELAY_S, MAX_RETRY_DELAY_S = 1.0, 600.0  # seconds between two attempts

log = structlog.get_logger(__name__)


class WebhookSender:
    def __init__(self, database: Database, urls: Sequence[str], secret: str) -> None:
        self._database = database
        self._urls = tuple(dict.fromkeys(urls))
        self._secret = secret
        self._is_registered = False
        self._trimmed_monotonic = 0.0

    async def deliver(self) -> None:
        if not self._is_registered:
            await self._register()
        if not self._urls:
            return
        await self._trim()
        due_batches = [
            await self._database.fetch_all("webhooks_due", {"url": url, "limit": DELIVERY_BATCH_SIZE})
            for url in self._urls
        ]
        if not any(due_batches):
            return
        async with httpx.AsyncClient(timeout=WEBHOOK_TIMEOUT_S, trust_env=False) as client:
            await asyncio.gather(*(self._deliver_all(client, rows) for rows in due_batches))

    async def _register(self) -> None:
        """Once in each term of the acting sidecar. From now on every event is also written for these receivers, by whichever sidecar writes it."""
        await self._database.execute("webhook_receivers_delete", {"urls": list(self._urls)})
        await self._database.execute("webhook_receivers_add", {"urls": list(self._urls)})
        self._is_registered = True

    async def _trim(self) -> None:
        if time.monotonic() - self._trimmed_monotonic < TRIM_INTERVAL_S:
            return
        self._trimmed_monotonic = time.monotonic()
        for row in await self._database.fetch_all(
            "webhooks_trim", {"limit": MAX_WAITING_WEBHOOKS, "oldest": MAX_WEBHOOK_AGE_S}
        ):
            log.error("webhooks are given up", receiver=display_host(row["url"]), messages=row["messages"])

    async def _deliver_all(self, client: httpx.AsyncClient, rows: Sequence[Row]) -> None:
        """Of one receiver. One that is away holds up no other; and is asked once, not for each message."""
        for row in rows:
            problem = await self._post(client, row)
            if not problem:
                await self._database.execute("webhook_done", {"id": row["id"]})
                continue
            delay = compute_backoff(row["attempts"])
            await self._database.execute("webhook_retry", {"id": row["id"], "wait": delay})
            attempt = row["attempts"] + 1
            log.warning("a webhook is not delivered", receiver=display_host(row["url"]), error=problem, attempt=attempt)
            return

    async def _post(self, client: httpx.AsyncClient, row: Row) -> str:
        """What is amiss; empty for delivered."""
        body = orjson.dumps(build_message(row))
        signature_headers = make_signature_headers(self._secret, f"msg_{row['uid']}", datetime.now(UTC), body)
        headers = {"content-type": "application/json", "user-agent": "abreast", **signature_headers}
        try:
            async with (
                asyncio.timeout(WEBHOOK_TIMEOUT_S),  # of all: a receiver may answer byte by byte
                client.stream("POST", row["url"], content=body, headers=headers) as response,
            ):
                return "" if response.is_success else f"it answers {response.status_code}"  # its body is not read
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return type(error).__name__  # its text may hold the URL, and that a token


def make_signature_headers(secret: str, message_id: str, sent_at: datetime, body: bytes) -> dict[str, str]:
    """Return the Standard Webhooks headers of one attempt; the id is the same at every attempt."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(sent_at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, sent_at, body.decode()),
    }


def compute_backoff(attempts: int) -> float:
    """Seconds: twice as long each time, and never in step with others."""
    return min(MIN_RETRY_DELAY_S * 2.0 ** min(attempts, 20), MAX_RETRY_DELAY_S) * random.uniform(0.75, 1.0)  # noqa: S311  # not a secret


def display_host(url: str) -> str:
    """What may be logged of it."""
    return urlsplit(url).hostname or "?"


def build_message(row: Row) -> dict[str, Any]:
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
            "before": to_share_values(row["before"]) if row["before"] else None,
            "after": to_share_values(row["after"]),
            "detail": row["detail"],
        },
    }


def to_share_values(document: Row) -> dict[str, Any]:
    """As the API has them: from 0 to 1."""
    return {
        "version": document["version"],
        "new_share": document["new_share"] / TOTAL_WEIGHT,
        "sample_safe": document["sample_safe"] / MILLION,
        "sample_unsafe": document["sample_unsafe"] / MILLION,
        "baseline_share": document["baseline_share"] / MILLION,
        "rolled_back": document["rolled_back"],
    }
