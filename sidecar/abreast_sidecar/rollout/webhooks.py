"""Sends events from the outbox to webhook receivers, at least once each.

An event stays in the outbox until it is delivered or too old. A retried message may arrive after a newer one.
"""

from __future__ import annotations

import asyncio
import hashlib
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

WEBHOOK_TIMEOUT_S = 5.0
MAX_WAITING_WEBHOOKS = 1000  # per receiver; the oldest are dropped
MAX_WEBHOOK_AGE_S = 3 * 86_400.0
TRIM_INTERVAL_S = 5.0
DELIVERY_BATCH_SIZE = 20
MIN_RETRY_DELAY_S, MAX_RETRY_DELAY_S = 1.0, 600.0

log = structlog.get_logger(__name__)


class WebhookSender:
    """Lives for one term of the leader."""

    def __init__(self, database: Database, urls: Sequence[str], secret: str) -> None:
        self._database = database
        self._urls = {name_receiver(url): url for url in urls}
        self._secret = secret
        self._is_registered = False
        self._trimmed_monotonic = 0.0

    async def deliver(self) -> None:
        """Send the messages that are due."""
        if not self._is_registered:  # from now on every sidecar writes its events for these receivers
            await self._database.execute("webhook_receivers_delete", {"names": list(self._urls)})
            await self._database.execute("webhook_receivers_add", {"names": list(self._urls)})
            self._is_registered = True
        if not self._urls:
            return
        await self._trim()
        due_batches = [
            await self._database.fetch_all("webhooks_due", {"receiver": name, "limit": DELIVERY_BATCH_SIZE})
            for name in self._urls
        ]
        if not any(due_batches):
            return
        async with httpx.AsyncClient(timeout=WEBHOOK_TIMEOUT_S, trust_env=False) as client:
            await asyncio.gather(*(self._deliver_all(client, rows) for rows in due_batches))

    async def _trim(self) -> None:
        if time.monotonic() - self._trimmed_monotonic < TRIM_INTERVAL_S:
            return
        self._trimmed_monotonic = time.monotonic()
        bounds = {"limit": MAX_WAITING_WEBHOOKS, "oldest": MAX_WEBHOOK_AGE_S}
        for row in await self._database.fetch_all("webhooks_trim", bounds):
            log.error("webhooks dropped", receiver=_get_host(row["receiver"]), messages=row["messages"])

    async def _deliver_all(self, client: httpx.AsyncClient, rows: Sequence[Row]) -> None:
        """Send the messages of one receiver until one fails. A slow receiver delays no other."""
        for row in rows:
            error = await self._post(client, row)
            if error:
                values = {"id": row["id"], "wait": compute_backoff(row["attempts"])}
                await self._database.execute("webhook_retry", values)
                host, attempt = _get_host(row["receiver"]), row["attempts"] + 1
                log.warning("webhook not delivered", receiver=host, error=error, attempt=attempt)
                return
            await self._database.execute("webhook_done", {"id": row["id"]})

    async def _post(self, client: httpx.AsyncClient, row: Row) -> str:
        """Return the error, empty if the message was delivered."""
        body = orjson.dumps(_build_message(row))
        signature_headers = make_signature_headers(self._secret, f"msg_{row['uid']}", datetime.now(UTC), body)
        headers = {"content-type": "application/json", "user-agent": "abreast", **signature_headers}
        try:
            async with (
                asyncio.timeout(WEBHOOK_TIMEOUT_S),  # httpx's timeout is per read
                client.stream("POST", self._urls[row["receiver"]], content=body, headers=headers) as response,
            ):
                return "" if response.is_success else f"the receiver answered {response.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return type(error).__name__  # the text may contain the URL with a token


def make_signature_headers(secret: str, message_id: str, sent_at: datetime, body: bytes) -> dict[str, str]:
    """Return the Standard Webhooks headers of one attempt. All attempts have the same id."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(sent_at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, sent_at, body.decode()),
    }


def compute_backoff(attempts: int) -> float:
    """Return the seconds until the next attempt: exponential, with jitter."""
    return min(MIN_RETRY_DELAY_S * 2.0 ** min(attempts, 20), MAX_RETRY_DELAY_S) * random.uniform(0.75, 1.0)  # noqa: S311  # not a secret


def name_receiver(url: str) -> str:
    """Return the host and a hash of the URL, which may contain a token. A log may contain the host only."""
    return f"{urlsplit(url).hostname or '?'} {hashlib.blake2b(url.encode(), digest_size=16).hexdigest()}"


def _get_host(receiver: str) -> str:
    return receiver.partition(" ")[0]


def _build_message(row: Row) -> dict[str, Any]:
    """Return the body, which docs/rollout.md describes field by field."""
    names = ("event_id", "service", "action", "actor", "reason", "detail")
    before, after = (row[name] and _to_share_values(row[name]) for name in ("before", "after"))
    return {
        "type": f"traffic.{row['action']}",
        "timestamp": row["at"].isoformat(),
        "data": {**{name: row[name] for name in names}, "before": before, "after": after},
    }


def _to_share_values(document: Row) -> dict[str, Any]:
    """Convert the shares to fractions, as in the API."""
    return {
        "version": document["version"],
        "new_share": document["new_share"] / TOTAL_WEIGHT,
        "sample_safe": document["sample_safe"] / MILLION,
        "sample_unsafe": document["sample_unsafe"] / MILLION,
        "baseline_share": document["baseline_share"] / MILLION,
        "rule_shares": {name: share / MILLION for name, share in document["rule_shares"].items()},
        "rolled_back": document["rolled_back"],
    }
