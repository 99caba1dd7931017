"""The join in Redis: its keys, and the script that services send captures with.

Per service and shard, all keys share the hash tag `{service/shard}`, so that they live on one node of a cluster:

    abreast:{shop/0}:pair:ID   hash    slot (version:role:attempt) → capture, while copies are missing
    abreast:{shop/0}:due       zset    pair id → when to give up waiting (ms, Redis's clock)
    abreast:{shop/0}:ready     stream  one entry a pair: `pair`, `why` (joined|swept), then slot → capture
    abreast:{shop/0}:joined    zset    pair id → when it was moved (ms): what comes later is late, not new; !ID was refused
    abreast:{shop/0}:stats     hash    counters, and `bytes`: what the hashes and the stream hold

Beside them, without a shard:

    abreast:services           hash    service → its number of shards
    abreast:{service}:reports  hash    id of a service process → its last report (JSON; see shipper)
    abreast:{service}:secret   string  key of the hashes that stand for secret headers, unless set

Redis's own clock decides deadlines, so that the clocks of services don't matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

SERVICES_KEY = "abreast:services"
CONSUMER_GROUP = "abreast"  # the consumer group of the sidecars

JOIN_SCRIPT = resources.files("abreast.protocol").joinpath("join.lua").read_text()

# Counters of `stats`. Of every capture that is sent exactly one of the first five is counted.
RECEIVED = "received"  # kept: it waits, or completed its pair
DUPLICATE = "duplicate"  # its slot was taken: a batch was sent twice
LATE = "late"  # its pair had been moved already: an answer after a failover, or after the deadline
REJECTED_PAIRS = "rejected_pairs"  # refused: as many pairs wait as are allowed, or a copy of its pair was refused
REJECTED_BYTES = "rejected_bytes"  # refused: as many bytes are held as are allowed
JOINED = "joined"  # pairs moved with all their copies
TIMED_OUT = "timed_out"  # pairs moved when their time was over


CaptureRow = tuple[str, str, int, bytes]  # of a batch: pair, slot, arms, encoded capture


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one shard of one service."""

    service: str
    shard: int

    def __post_init__(self) -> None:
        if not self.service or set(self.service) & set("{}/"):
            raise ValueError("a service's name must not be empty nor hold any of { } /")

    @property
    def prefix(self) -> str:
        return f"abreast:{{{self.service}/{self.shard}}}:"

    def pair(self, pair: str) -> str:
        return f"{self.prefix}pair:{pair}"

    @property
    def due(self) -> str:
        return f"{self.prefix}due"

    @property
    def ready(self) -> str:
        return f"{self.prefix}ready"

    @property
    def joined(self) -> str:
        return f"{self.prefix}joined"

    @property
    def stats(self) -> str:
        return f"{self.prefix}stats"


def reports_key(service: str) -> str:
    return f"abreast:{{{service}}}:reports"


def redaction_key(service: str) -> str:
    return f"abreast:{{{service}}}:secret"


def shard_of(pair: str, shards: int) -> int:
    return zlib.crc32(pair.encode()) % shards


@dataclass(frozen=True, slots=True)
class Limits:
    """What one shard may hold. Above it the script refuses and counts."""

    wait_ms: int = 10_000  # how long a pair waits for its missing copies
    max_pairs: int = 100_000  # that wait for a copy, or for a worker
    max_bytes: int = 256 * 1024 * 1024  # waiting and ready together
    max_remembered_ids: int = 200_000  # ids of moved pairs that are remembered, to know a late capture
    remember_ms: int = 300_000


def join_arguments(keys: Keys, limits: Limits, rows: Sequence[CaptureRow]) -> tuple[list[str], list[str | int | bytes]]:
    """Keys and arguments of the script for captures, all of this shard."""
    names = [keys.due, keys.ready, keys.joined, keys.stats]
    arguments: list[str | int | bytes] = [
        limits.wait_ms,
        limits.max_pairs,
        limits.max_bytes,
        limits.max_remembered_ids,
        limits.remember_ms,
    ]
    for pair, slot, expected_captures, blob in rows:
        names.append(keys.pair(pair))
        arguments += [pair, slot, expected_captures, blob]
    return names, arguments


def join_command(sha: str, keys: Keys, limits: Limits, rows: Sequence[CaptureRow]) -> bytes:
    """EVALSHA with the same keys and arguments, in Redis's protocol: a client takes several times as long to write it."""
    prefix = keys.pair("").encode()
    names: list[bytes] = []
    arguments: list[bytes] = []
    for pair, slot, expected_captures, blob in rows:
        pair_bytes, slot_bytes, count_bytes = pair.encode(), slot.encode(), b"%d" % expected_captures
        names.append(b"$%d\r\n%b%b\r\n" % (len(prefix) + len(pair_bytes), prefix, pair_bytes))
        arguments += (
            b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n"
            % (len(pair_bytes), pair_bytes, len(slot_bytes), slot_bytes, len(count_bytes), count_bytes, len(blob)),
            blob,
            b"\r\n",
        )
    shard_keys, limit_arguments = join_arguments(keys, limits, ())
    command_head: list[str | int | bytes] = ["EVALSHA", sha, len(shard_keys) + len(names), *shard_keys]
    count = b"*%d\r\n" % (len(command_head) + len(names) + len(limit_arguments) + 4 * len(rows))
    return b"".join(
        (count, *_encode_bulk_strings(command_head), *names, *_encode_bulk_strings(limit_arguments), *arguments)
    )


def _encode_bulk_strings(values: Sequence[str | int | bytes]) -> Iterator[bytes]:
    for value in values:
        text = value if isinstance(value, bytes) else str(value).encode()
        yield b"$%d\r\n%b\r\n" % (len(text), text)
