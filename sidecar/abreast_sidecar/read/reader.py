"""Reads ready pairs through a consumer group. Each entry stays pending until it is acknowledged, so that none is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

import redis

from abreast.join import GROUP, Keys
from abreast_sidecar.read.client import BLOCK, connect, script, translated
from abreast_sidecar.read.entry import Entry, entry
from abreast_sidecar.read.shards import shards

DISCOVER = 1.0  # seconds between looks for new services
IDLE = 0.25  # seconds to wait where no service has sent anything yet: there is nothing to block on
BATCH_BYTES = 64 * 1024 * 1024  # aimed at; a batch of huge bodies has fewer pairs
FIRST_SIZE = 4 * 1024 * 1024  # bytes of an entry, until some were seen
ACKNOWLEDGE = script("acknowledge")
FORGET = script("forget")


class Reader:
    """One consumer. `read` returns entries of its own former life first, then left ones, then new ones."""

    def __init__(self, url: str, *, name: str, batch_size: int, claim_idle: float) -> None:
        self.name = name
        self.batch_size = max(1, batch_size)
        self.claim_idle = claim_idle
        self._client = connect(url)
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
            acknowledge = self._client.register_script(ACKNOWLEDGE)
            for keys, pairs in by_shard.items():
                await acknowledge(keys=[keys.ready, keys.stats], args=[GROUP, *pairs])

    async def close(self) -> None:
        """Take leave of the groups, unless something is pending, and disconnect."""
        try:
            with translated():
                forget = self._client.register_script(FORGET)
                for keys in self._shards:
                    await forget(keys=[keys.ready], args=[GROUP, self.name])
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
            if keys in self._shards:
                continue
            try:
                await self._client.xgroup_create(keys.ready, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
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
            found += [entry(keys, identifier, fields) for identifier, fields in raw[1] if fields]
            if len(found) >= self.batch_size:
                break
        return found

    async def _new(self) -> list[Entry]:
        if not self._shards:
            await asyncio.sleep(IDLE)
            return []
        names = {keys.ready.encode(): keys for keys in self._shards}
        streams: dict[Any, Any] = dict.fromkeys(names, ">")
        raw = await self._client.xreadgroup(
            GROUP, self.name, streams, count=self._count(self._busy), block=BLOCK
        )
        found = [
            entry(names[stream], identifier, fields) for stream, identifier, fields in _flat(raw) if fields
        ]
        if found:
            self._busy = len({one.keys for one in found})
            self._size = max(sum(one.size for one in found) / len(found), self._size * 0.8, 1.0)
        return found

    def _count(self, streams: int) -> int:
        return max(1, min(self.batch_size, int(BATCH_BYTES / self._size)) // streams)


def _flat(raw: Any) -> list[tuple[bytes, bytes, Mapping[bytes, bytes]]]:
    """(stream, id, fields) from an answer to XREADGROUP: RESP2 has a list of streams, RESP3 a map with one level more."""
    if isinstance(raw, dict):
        raw = [(stream, [one for page in pages for one in page]) for stream, pages in raw.items()]
    return [(stream, identifier, fields) for stream, entries in raw or () for identifier, fields in entries]
