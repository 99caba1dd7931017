"""One entry of a stream: a pair that is ready to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abreast.join import Keys

MIN_ENTRY_MS = 0  # ms; ids of entries are made by Redis, but anyone may write a stream
MAX_ENTRY_MS = 4_102_444_800_000  # ms: the year 2100


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """`blobs` are its captures as services sent them; `size` is what they weigh in the shard's `bytes`."""

    keys: Keys
    id: str
    pair_id: str
    ready_reason: str
    blobs: tuple[bytes, ...]
    size_bytes: int
    delivery_count: int = (
        1  # how often workers were given it, this time included; only known of what another left
    )

    @property
    def time_ms(self) -> int:
        """ms since the epoch, by Redis's clock."""
        return min(max(int(self.id.partition("-")[0]), MIN_ENTRY_MS), MAX_ENTRY_MS)


def parse_entry(
    keys: Keys, raw_id: bytes, fields: Mapping[bytes, bytes], delivery_count: int = 1
) -> StreamEntry:
    """Takes whatever stands in the stream; an entry without a pair's id is named by its own."""
    pair_id = ready_reason = b""
    blobs = []
    for field_name, value in fields.items():
        if field_name == b"pair":
            pair_id = value
        elif field_name == b"why":
            ready_reason = value
        else:
            blobs.append(value)
    entry_id = raw_id.decode()
    return StreamEntry(
        keys=keys,
        id=entry_id,
        pair_id=pair_id.decode(errors="replace") or f"entry {entry_id}",
        ready_reason=ready_reason.decode(errors="replace"),
        blobs=tuple(blobs),
        size_bytes=sum(map(len, blobs)),
        delivery_count=delivery_count,
    )
