"""Tells of work that a shadow request started and that goes on long after it.

Such work may serve users too: a consumer of a queue that the first request of a process starts, for all that follow.
"""

from __future__ import annotations

import logging
from time import perf_counter_ns

from abreast.context import Current

logger = logging.getLogger("abreast")

LONG = 60.0  # seconds since the request came
MOST = 100  # names that are remembered
TOLD: set[str] = set()


def outlived(request: Current, what: str) -> None:
    """Once for each name."""
    if not (request.shadow and request.answered) or what in TOLD or len(TOLD) >= MOST:
        return
    seconds = (perf_counter_ns() - request.began) / 1e9
    if request.began and seconds > LONG:
        TOLD.add(what)
        logger.warning(
            "%s is held back %d s after its shadow request; what serves users too must be started outside of requests, or "
            "with context=contextvars.Context() (logged once)",
            what,
            seconds,
        )
