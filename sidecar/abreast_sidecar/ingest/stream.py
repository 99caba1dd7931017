"""Reads ready pairs through a consumer group. Entries stay pending until acknowledged, so that none is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import redis
import structlog

from abreast.protocol.join import CONSUMER_GROUP, Keys
from abreast.protocol.redis_client import is_cluster
from abreast_sidecar.redis_client import READ_BLOCK_MS, connect_redis, list_shards, load_script, map_redis_errors

MIN_ENTRY_MS = 0  # Redis makes the ids of entries, but anyone may write to a stream
MAX_ENTRY_MS = 4_102_444_800_000  # the year 2100
DISCOVERY_INTERVAL_S = 1.0  # between searches for new services, while entries arrive or no service is known
IDLE_DISCOVERY_INTERVAL_S = 3.0
FORMER_SHARDS_INTERVAL_S = 30.0  # between searches for streams of former shards
MAX_CLAIM_INTERVAL_S = 10.0  # between searches for abandoned entries
MIN_POLL_S, MAX_POLL_S = 0.01, 0.1  # between reads of a cluster's streams while they are empty
NO_STREAM_DELAY_S = 0.25  # without a stream, no read can block
DEFAULT_BATCH_BYTES = 64 * 1024 * 1024
INITIAL_ENTRY_BYTES = 4 * 1024 * 1024  # assumed before the first entries
ACKNOWLEDGE_SCRIPT = load_script("acknowledge")
CREATE_GROUP_SCRIPT = load_script("create_group")
DELETE_CONSUMER_SCRIPT = load_script("delete_consumer")

RawEntry = tuple[bytes, bytes, Mapping[bytes, bytes]]  # stream, id, fields

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """An entry of a shard's stream."""

    keys: Keys
    id: str
    pair_id: str
    ready_reason: str
    blobs: tuple[bytes, ...]  # encoded captures
    size_bytes: int  # its part of the shard's `bytes`
    delivery_count: int = 1  # including this delivery; only known for abandoned entries

    @property
    def time_ms(self) -> int:
        """Return Unix time by Redis's clock."""
        return min(max(int(self.id.partition("-")[0]), MIN_ENTRY_MS), MAX_ENTRY_MS)


def parse_entry(keys: Keys, raw_id: bytes, fields: Mapping[bytes, bytes], delivery_count: int = 1) -> StreamEntry:
    """Accept any fields. An entry without a pair's id gets its own id."""
    entry_id = raw_id.decode()
    pair_id = fields.get(b"pair", b"").decode(errors="replace") or f"entry {entry_id}"
    ready_reason = fields.get(b"why", b"").decode(errors="replace")
    blobs = tuple(value for name, value in fields.items() if name not in {b"pair", b"why"})
    return StreamEntry(keys, entry_id, pair_id, ready_reason, blobs, sum(map(len, blobs)), delivery_count)


class StreamConsumer:
    """One consumer. `read` returns its own pending entries first, then abandoned ones, then new ones.

    `batch_bytes` is a target: a batch with large bodies has fewer entries.
    """

    def __init__(
        self, url: str, *, name: str, batch_size: int, claim_idle_s: float, batch_bytes: int = DEFAULT_BATCH_BYTES
    ) -> None:
        self.name = name
        self.batch_size = max(1, batch_size)
        self.batch_bytes = batch_bytes
        self.claim_idle_s = claim_idle_s
        self._client = connect_redis(url)
        self._is_cluster = is_cluster(self._client)
        self._cursors: dict[Keys, str] = {}  # position among the own pending entries; > after the last
        self._claim_cursors: dict[Keys, bytes | str] = {}
        self._last_discovery = self._last_full_discovery = self._last_claim = -float("inf")
        self._is_idle = False  # the last read found no entries
        self._busy_streams = 1  # streams with entries in the last read
        self._mean_entry_bytes = float(INITIAL_ENTRY_BYTES)

    async def read(self) -> list[StreamEntry]:
        """Return about a batch at most, and nothing after READ_BLOCK_MS without entries. Raise RedisError."""
        with map_redis_errors():
            try:
                return await self._read()
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                self._cursors.clear()  # Redis lost its data: create the groups again
                self._last_discovery = self._last_full_discovery = -float("inf")
                return []
            except (redis.RedisError, OSError):
                self.reread_pending()
                raise

    def reread_pending(self) -> None:
        """Read the own pending entries again, because Redis may have delivered entries in a lost response."""
        self._cursors = dict.fromkeys(self._cursors, "0")

    async def acknowledge(self, entries: Iterable[StreamEntry]) -> None:
        """Delete the entries from their streams. Raise RedisError; the entries are delivered again then."""
        by_shard: dict[Keys, list[str | int]] = {}
        for entry in entries:
            by_shard.setdefault(entry.keys, []).extend((entry.id, entry.size_bytes))
        with map_redis_errors():
            for keys, ids_and_sizes in by_shard.items():
                await ACKNOWLEDGE_SCRIPT.run(
                    self._client, [keys.ready, keys.stats, keys.due], [CONSUMER_GROUP, *ids_and_sizes]
                )

    async def close(self) -> None:
        """Delete this consumer where it has no pending entries, and disconnect."""
        try:
            with map_redis_errors():
                for keys in self._cursors:
                    await DELETE_CONSUMER_SCRIPT.run(self._client, [keys.ready], [CONSUMER_GROUP, self.name])
        finally:
            await self._client.aclose()

    async def _read(self) -> list[StreamEntry]:
        now = time.monotonic()
        is_quiet = self._is_idle and self._cursors
        if now - self._last_discovery >= (IDLE_DISCOVERY_INTERVAL_S if is_quiet else DISCOVERY_INTERVAL_S):
            include_former = now - self._last_full_discovery >= FORMER_SHARDS_INTERVAL_S
            shards = await list_shards(self._client, include_former=include_former)
            if include_former:  # all shards with data
                self._cursors = {keys: self._cursors[keys] for keys in shards if keys in self._cursors}
            for keys in shards:
                if keys not in self._cursors:
                    await CREATE_GROUP_SCRIPT.run(self._client, [keys.ready], [CONSUMER_GROUP])
                    self._cursors[keys] = "0"
            self._last_discovery = now
            self._last_full_discovery = now if include_former else self._last_full_discovery
        entries = await self._read_own_pending()
        if not entries and now - self._last_claim >= min(MAX_CLAIM_INTERVAL_S, self.claim_idle_s / 3):
            entries = await self._claim_abandoned()
            self._last_claim = now if len(entries) < self.batch_size else self._last_claim
        entries = entries or await self._read_new()
        self._is_idle = not entries
        return entries

    async def _read_own_pending(self) -> list[StreamEntry]:
        """Read entries that were delivered to this consumer and not acknowledged."""
        entries: list[StreamEntry] = []
        for keys in [keys for keys, cursor in self._cursors.items() if cursor != ">"]:
            raw = await self._read_group({keys.ready: self._cursors[keys]}, self._compute_limit_per_stream(1))
            entries += [parse_entry(keys, identifier, fields) for _, identifier, fields in raw if fields]
            deleted_ids = [identifier for _, identifier, fields in raw if not fields]  # deleted by someone else's hand
            if deleted_ids:
                await self._client.xack(keys.ready, CONSUMER_GROUP, *deleted_ids)
            self._cursors[keys] = raw[-1][1].decode() if raw else ">"
            if len(entries) >= self.batch_size:
                break
        return entries

    async def _claim_abandoned(self) -> list[StreamEntry]:
        """Take over entries that other consumers have not acknowledged for `claim_idle_s`."""
        entries: list[StreamEntry] = []
        for keys in self._cursors:
            cursor = self._claim_cursors.get(keys, "0-0")
            idle_ms = int(self.claim_idle_s * 1000)
            raw = await self._client.xautoclaim(
                keys.ready, CONSUMER_GROUP, self.name, idle_ms, cursor, count=self._compute_limit_per_stream(1)
            )
            self._claim_cursors[keys] = raw[0]
            raw_entries = [(identifier, fields) for identifier, fields in raw[1] if fields]
            if raw_entries:  # an entry that crashes workers has many deliveries
                id_range = raw_entries[0][0], raw_entries[-1][0]
                pending: Any = await self._client.xpending_range(
                    keys.ready, CONSUMER_GROUP, *id_range, len(raw[1]), self.name
                )
                counts = {message["message_id"]: message["times_delivered"] for message in pending}
                entries += [parse_entry(keys, raw_id, fields, counts.get(raw_id, 1)) for raw_id, fields in raw_entries]
            if len(entries) >= self.batch_size:
                break
        return entries

    async def _read_new(self) -> list[StreamEntry]:
        if not self._cursors:
            await asyncio.sleep(NO_STREAM_DELAY_S)
            return []
        keys_by_stream = {keys.ready.encode(): keys for keys in self._cursors}
        cursors: dict[Any, Any] = dict.fromkeys(keys_by_stream, ">")
        count = self._compute_limit_per_stream(self._busy_streams)
        if self._is_cluster:
            raw = await self._read_polling(cursors, count)
        else:
            raw = await self._read_group(cursors, count, block_ms=READ_BLOCK_MS)
        entries = [
            parse_entry(keys_by_stream[stream], identifier, fields) for stream, identifier, fields in raw if fields
        ]
        if entries:
            self._busy_streams = len({item.keys for item in entries})
            self._mean_entry_bytes = max(
                sum(item.size_bytes for item in entries) / len(entries), self._mean_entry_bytes * 0.8, 1.0
            )
        return entries

    async def _read_polling(self, cursors: Mapping[Any, Any], count: int) -> list[RawEntry]:
        """Poll all streams of a cluster, because a blocking call sees only one shard.

        Wait for all responses even if one fails: their entries are read again.
        """
        deadline, delay_s = time.monotonic() + READ_BLOCK_MS / 1000, MIN_POLL_S
        while True:
            calls = [self._read_group({stream: cursor}, count) for stream, cursor in cursors.items()]
            responses = await asyncio.gather(*calls, return_exceptions=True)
            raw_entries: list[RawEntry] = []
            for response in responses:
                if isinstance(response, BaseException):
                    raise response
                raw_entries += response
            if raw_entries or time.monotonic() >= deadline:
                return raw_entries
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, MAX_POLL_S)

    async def _read_group(self, cursors: dict[Any, Any], count: int, block_ms: int | None = None) -> list[RawEntry]:
        """Read for this consumer. RESP2 has a list of streams, RESP3 a map with one more level."""
        raw: Any = await self._client.xreadgroup(CONSUMER_GROUP, self.name, cursors, count=count, block=block_ms)
        if isinstance(raw, dict):
            raw = [(stream, [raw_entry for page in pages for raw_entry in page]) for stream, pages in raw.items()]
        return [(stream, identifier, fields) for stream, entries in raw or () for identifier, fields in entries]

    def _compute_limit_per_stream(self, stream_count: int) -> int:
        return max(1, min(self.batch_size, int(self.batch_bytes / self._mean_entry_bytes)) // stream_count)
