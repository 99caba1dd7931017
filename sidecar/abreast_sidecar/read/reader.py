"""Reads ready pairs through a consumer group. Each entry stays pending until it is acknowledged, so that none is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import redis

from abreast.join import GROUP, Keys
from abreast.redis_url import is_cluster
from abreast_sidecar.read.client import BLOCK, connect, script, translated
from abreast_sidecar.read.entry import Entry, entry
from abreast_sidecar.read.shards import shards

DISCOVER = 1.0  # seconds between looks for new services
POLL, LONGEST_POLL = 0.01, 0.1  # seconds between two looks into a cluster's streams, while they are empty
IDLE = 0.25  # seconds to wait where no service has sent anything yet: there is nothing to block on
BATCH_BYTES = 64 * 1024 * 1024
FIRST_SIZE = 4 * 1024 * 1024  # bytes of an entry, until some were seen
ACKNOWLEDGE = script("acknowledge")
FORGET = script("forget")
GROUPED = script("group")

Raw = tuple[bytes, bytes, Mapping[bytes, bytes]]  # stream, id, fields


class Reader:
    """One consumer. `read` returns entries of its own former life first, then left ones, then new ones.

    `batch_bytes` is aimed at: a batch of huge bodies has fewer pairs.
    """

    def __init__(
        self, url: str, *, name: str, batch_size: int, claim_idle: float, batch_bytes: int = BATCH_BYTES
    ) -> None:
        self.name = name
        self.batch_size = max(1, batch_size)
        self.batch_bytes = batch_bytes
        self.claim_idle = claim_idle
        self._client = connect(url)
        self._polls = is_cluster(self._client)
        self._shards: dict[Keys, str] = {}  # → where to go on among the own entries; > when there are no more
        self._claim_from: dict[Keys, bytes | str] = {}
        self._discovered = self._claimed = -float("inf")
        self._busy = 1  # streams that had something at the last read
        self._size = float(FIRST_SIZE)

    async def read(self) -> list[Entry]:
        """At most about a batch; empty after a quiet second. Raise RedisError; then call again later."""
        with translated():
            try:
                return await self._read()
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                self._shards.clear()  # Redis was emptied: make the groups anew
                self._discovered = -float("inf")
                return []
            except (redis.RedisError, OSError):
                self.recover()
                raise

    def recover(self) -> None:
        """Look at the own pending entries again: an answer that did not arrive had given us some."""
        self._shards = dict.fromkeys(self._shards, "0")

    async def acknowledge(self, entries: Iterable[Entry]) -> None:
        """Safe to repeat. Raise RedisError; then the entries will come again."""
        by_shard: dict[Keys, list[str | int]] = {}
        for one in entries:
            by_shard.setdefault(one.keys, []).extend((one.id, one.size))
        with translated():
            for keys, pairs in by_shard.items():
                await ACKNOWLEDGE.run(self._client, [keys.ready, keys.stats, keys.due], [GROUP, *pairs])

    async def close(self) -> None:
        """Take leave of the groups, unless something is pending, and disconnect."""
        try:
            with translated():
                for keys in self._shards:
                    await FORGET.run(self._client, [keys.ready], [GROUP, self.name])
        finally:
            await self._client.aclose()

    async def _read(self) -> list[Entry]:
        now = time.monotonic()
        if now - self._discovered >= DISCOVER:
            await self._discover()
            self._discovered = now
        found = await self._own()
        if not found and now - self._claimed >= min(10.0, self.claim_idle / 3):
            found = await self._left()
            self._claimed = now if len(found) < self.batch_size else self._claimed
        return found or await self._new()

    async def _discover(self) -> None:
        for keys in await shards(self._client):
            if keys not in self._shards:
                await GROUPED.run(self._client, [keys.ready], [GROUP])
                self._shards[keys] = "0"

    async def _own(self) -> list[Entry]:
        """What was given to this consumer before, and is not acknowledged."""
        found: list[Entry] = []
        for keys in [keys for keys, after in self._shards.items() if after != ">"]:
            given: dict[Any, Any] = {keys.ready: self._shards[keys]}
            raw = _flat(await self._client.xreadgroup(GROUP, self.name, given, count=self._count(1)))
            found += [entry(keys, identifier, fields) for _, identifier, fields in raw if fields]
            gone = [
                identifier for _, identifier, fields in raw if not fields
            ]  # deleted by someone else's hand
            if gone:
                await self._client.xack(keys.ready, GROUP, *gone)
            self._shards[keys] = raw[-1][1].decode() if raw else ">"
            if len(found) >= self.batch_size:
                break
        return found

    async def _left(self) -> list[Entry]:
        """What other consumers were given and did not acknowledge for too long."""
        found: list[Entry] = []
        for keys in self._shards:
            after = self._claim_from.get(keys, "0-0")
            idle = int(self.claim_idle * 1000)
            raw = await self._client.xautoclaim(
                keys.ready, GROUP, self.name, idle, after, count=self._count(1)
            )
            self._claim_from[keys] = raw[0]
            claimed = [(identifier, fields) for identifier, fields in raw[1] if fields]
            if claimed:
                times = await self._deliveries(keys, claimed[0][0], claimed[-1][0], len(raw[1]))
                found += [entry(keys, one, fields, times.get(one, 1)) for one, fields in claimed]
            if len(found) >= self.batch_size:
                break
        return found

    async def _deliveries(self, keys: Keys, first: bytes, last: bytes, count: int) -> dict[bytes, int]:
        """How often each of the entries was given to a worker: many times where that ends the worker."""
        raw: Any = await self._client.xpending_range(keys.ready, GROUP, first, last, count, self.name)
        return {one["message_id"]: one["times_delivered"] for one in raw}

    async def _new(self) -> list[Entry]:
        if not self._shards:
            await asyncio.sleep(IDLE)
            return []
        names = {keys.ready.encode(): keys for keys in self._shards}
        raw = await (self._polled(list(names)) if self._polls else self._blocking(list(names)))
        found = [entry(names[stream], identifier, fields) for stream, identifier, fields in raw if fields]
        if found:
            self._busy = len({one.keys for one in found})
            self._size = max(sum(one.size for one in found) / len(found), self._size * 0.8, 1.0)
        return found

    async def _blocking(self, streams: Sequence[bytes]) -> list[Raw]:
        asked: dict[Any, Any] = dict.fromkeys(streams, ">")
        count = self._count(self._busy)
        return _flat(await self._client.xreadgroup(GROUP, self.name, asked, count=count, block=BLOCK))

    async def _polled(self, streams: Sequence[bytes]) -> list[Raw]:
        """In a cluster a call reads one shard, and who waits at one does not see the others."""
        until, pause = time.monotonic() + BLOCK / 1000, POLL
        while True:
            found = [one for part in await self._all(streams) for one in _flat(part)]
            if found or time.monotonic() >= until:
                return found
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_POLL)

    async def _all(self, streams: Sequence[bytes]) -> list[Any]:
        """All answers are waited for also when one fails: what the others had been given is then read again."""
        count = self._count(self._busy)
        calls = [self._client.xreadgroup(GROUP, self.name, {one: ">"}, count=count) for one in streams]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _count(self, streams: int) -> int:
        return max(1, min(self.batch_size, int(self.batch_bytes / self._size)) // streams)


def _flat(raw: Any) -> list[Raw]:
    """(stream, id, fields) from an answer to XREADGROUP: RESP2 has a list of streams, RESP3 a map with one level more."""
    if isinstance(raw, dict):
        raw = [(stream, [one for page in pages for one in page]) for stream, pages in raw.items()]
    return [(stream, identifier, fields) for stream, entries in raw or () for identifier, fields in entries]
