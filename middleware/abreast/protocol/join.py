"""The join of captures in Redis: its keys, and the script that services call with their captures.

The keys of a service and shard share the hash tag `{service/shard}`, so that they are on one node of a cluster:

    abreast:{shop/0}:pair:ID   hash    slot → capture, while captures are missing. A slot is version:role:attempt. For a
                                       pair of a middleware's capture and one of Envoy, Envoy also measures the first:
                                       slot+ waits for these times, and slot= has them
    abreast:{shop/0}:due       zset    pair id → deadline (ms, the clock of Redis)
    abreast:{shop/0}:ready     stream  one entry per pair: `pair`, `why` (joined|timed_out), then slot → capture;
                                       and for each late capture of a timed out pair: `why` is late
    abreast:{shop/0}:joined    zset    pair id → time of the move (ms), to detect late captures; ?ID timed out; !ID
                                       and $ID were rejected for max_pairs and max_bytes, `!ID SLOT` and `$ID SLOT`
                                       are their rejected captures
    abreast:{shop/0}:stats     hash    counters, and `bytes`: the size of the hashes and the stream

Keys without a shard:

    abreast:services           hash    service → number of shards
    abreast:{service}:reports  hash    id of a service process → last report (JSON; see abreast.export)

The clock of Redis decides deadlines, so that the clocks of services don't matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

SERVICES_KEY = "abreast:services"
CONSUMER_GROUP = "abreast"  # the consumer group of the sidecars

JOIN_SCRIPT = resources.files("abreast.protocol").joinpath("join.lua").read_text()

# Counters of `stats`. The script counts every capture in exactly one of the first five. A batch may come twice, if its
# first reply was lost: then its stored captures are duplicates, and its rejected captures are not counted again.
RECEIVED = "received"  # stored, or it completed its pair
DUPLICATE = "duplicate"  # its slot is taken: a batch was sent twice
LATE = "late"  # its pair has moved to the stream: a response after a failover, or after the deadline
REJECTED_PAIRS = "rejected_pairs"  # max_pairs wait, or another capture of the pair was rejected for that
REJECTED_BYTES = "rejected_bytes"  # max_bytes are stored, or the same
JOINED = "joined"  # pairs that moved with all captures
TIMED_OUT = "timed_out"  # pairs that moved at their deadline

CaptureRow = tuple[str, str, int, bytes]  # pair id, slot, number of captures of the pair, encoded capture


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one shard of one service."""

    service: str
    shard: int

    def __post_init__(self) -> None:
        if not self.service or set(self.service) & set("{}/"):
            raise ValueError("a service name must not be empty or contain { } /")

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


def shard_of(pair: str, shards: int) -> int:
    return zlib.crc32(pair.encode()) % shards


class Limits(NamedTuple):
    """The limits of one shard, in the order of the script's arguments. Above them, it rejects and counts captures."""

    wait_ms: int = 10_000  # time that a pair waits for missing captures
    max_pairs: int = 100_000  # pairs that wait for a capture or for a worker
    max_bytes: int = 256 * 1024 * 1024  # waiting and ready pairs together
    max_remembered_ids: int = 200_000  # ids of moved pairs, to detect late captures
    remember_ms: int = 300_000


def join_arguments(keys: Keys, limits: Limits, rows: Sequence[CaptureRow]) -> tuple[list[str], list[str | int | bytes]]:
    """Return keys and arguments of the script for captures of one shard."""
    names = [keys.due, keys.ready, keys.joined, keys.stats]
    arguments: list[str | int | bytes] = [*limits]
    for pair, slot, expected_captures, blob in rows:
        names.append(keys.pair(pair))
        arguments += [pair, slot, expected_captures, blob]
    return names, arguments


def join_command(sha: str, keys: Keys, limits: Limits, rows: Sequence[CaptureRow]) -> bytes:
    """Encode EVALSHA in the protocol of Redis. redis-py takes several times as long for the same."""
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
