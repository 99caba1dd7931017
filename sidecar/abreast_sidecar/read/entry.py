"""One entry of a stream: a pair that is ready to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abreast.join import Keys

EARLIEST = 0  # ms; ids of entries are made by Redis, but anyone may write a stream
LATEST = 4_102_444_800_000  # ms: the year 2100


@dataclass(frozen=True, slots=True)
class Entry:
    """`blobs` are its captures as services sent them; `size` is what they weigh in the shard's `bytes`."""

    keys: Keys
    id: str
    pair: str
    why: str
    blobs: tuple[bytes, ...]
    size: int
    deliveries: int = (
        1  # how often workers were given it, this time included; only known of what another left
    )

    @property
    def at(self) -> int:
        """ms since the epoch, by Redis's clock."""
        return min(max(int(self.id.partition("-")[0]), EARLIEST), LATEST)


def entry(keys: Keys, identifier: bytes, fields: Mapping[bytes, bytes], deliveries: int = 1) -> Entry:
    """Takes whatever stands in the stream; an entry without a pair's id is named by its own."""
    pair = why = b""
    blobs = []
    for slot, value in fields.items():
        if slot == b"pair":
            pair = value
        elif slot == b"why":
            why = value
        else:
            blobs.append(value)
    name = identifier.decode()
    return Entry(
        keys=keys,
        id=name,
        pair=pair.decode(errors="replace") or f"entry {name}",
        why=why.decode(errors="replace"),
        blobs=tuple(blobs),
        size=sum(map(len, blobs)),
        deliveries=deliveries,
    )
