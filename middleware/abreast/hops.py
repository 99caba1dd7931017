"""Where a sampled request's time went: what its code asked of a cache, a database or anything else, and for how long.

It travels with the capture, bounded in number, and is shown by `abreast pair`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

from abreast.capture import SpanRow
from abreast.context import CURRENT_CONTEXT, RequestContext

MAX_SPANS = 100  # of a request; those beyond are not kept
MAX_SPAN_NAME_CHARS = 100  # characters
HIT, MISS = "hit", "miss"


class Spans:
    """Of one request. `hits` and `misses` of a cache are counted beyond the bound too."""

    __slots__ = ("hits", "misses", "rows")

    def __init__(self) -> None:
        self.rows: list[SpanRow] = []
        self.hits = 0
        self.misses = 0


def add_span(context: RequestContext, kind: str, name: str, started_ns: int, note: str = "") -> None:
    """Note one that began at `since` (perf_counter_ns) and ends now, if the request is recorded."""
    if not context.is_captured or context.response_sent:
        return
    spans = context.spans
    if spans is None:
        spans = context.spans = Spans()
    spans.hits += note == HIT
    spans.misses += note == MISS
    if len(spans.rows) < MAX_SPANS:
        start_us = (started_ns - context.started_ns) // 1000
        duration_us = (perf_counter_ns() - started_ns) // 1000
        spans.rows.append(
            (
                kind[:MAX_SPAN_NAME_CHARS],
                name[:MAX_SPAN_NAME_CHARS],
                start_us,
                duration_us,
                note[:MAX_SPAN_NAME_CHARS],
            )
        )


@contextmanager
def span(name: str, kind: str = "call") -> Iterator[None]:
    """Time what the block asks of something else: `with abreast.hop("search"): ...`"""
    context, started_ns, note = CURRENT_CONTEXT.get(), perf_counter_ns(), ""
    try:
        yield
    except BaseException as error:
        note = type(error).__name__
        raise
    finally:
        add_span(context, kind, name, started_ns, note)
