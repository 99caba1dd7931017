"""Where a sampled request's time went: what its code asked of a cache, a database or anything else, and for how long.

It travels with the capture, bounded in number, and is shown by `abreast pair`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

from abreast.capture import HopRow
from abreast.context import CURRENT, Current

MOST = 100  # of a request; those beyond are not kept
MOST_NAME = 100  # characters
HIT, MISS = "hit", "miss"


class Hops:
    """Of one request. `hits` and `misses` of a cache are counted beyond the bound too."""

    __slots__ = ("hits", "kept", "misses")

    def __init__(self) -> None:
        self.kept: list[HopRow] = []
        self.hits = 0
        self.misses = 0


def went(request: Current, kind: str, name: str, since: int, note: str = "") -> None:
    """Note one that began at `since` (perf_counter_ns) and ends now, if the request is recorded."""
    if not request.recorded or request.answered:
        return
    hops = request.hops
    if hops is None:
        hops = request.hops = Hops()
    hops.hits += note == HIT
    hops.misses += note == MISS
    if len(hops.kept) < MOST:
        at_us = (since - request.began) // 1000
        took_us = (perf_counter_ns() - since) // 1000
        hops.kept.append((kind[:MOST_NAME], name[:MOST_NAME], at_us, took_us, note[:MOST_NAME]))


@contextmanager
def hop(name: str, kind: str = "call") -> Iterator[None]:
    """Time what the block asks of something else: `with abreast.hop("search"): ...`"""
    request, since, note = CURRENT.get(), perf_counter_ns(), ""
    try:
        yield
    except BaseException as error:
        note = type(error).__name__
        raise
    finally:
        went(request, kind, name, since, note)
