"""Tells of work that a shadow request started and that goes on long after it.

Such work may serve users too: a consumer of a queue that the first request of a process starts, for all that follow.
"""

from __future__ import annotations

import logging
from time import perf_counter_ns

from abreast.context import RequestContext

logger = logging.getLogger("abreast")

MAX_SHADOW_AGE_S = 60.0  # seconds since the request came
MAX_WARNED_NAMES = 100  # names that are remembered
WARNED_NAMES: set[str] = set()


def warn_if_request_outlived(context: RequestContext, name: str) -> None:
    """Once for each name."""
    if (
        not (context.is_shadow and context.response_sent)
        or name in WARNED_NAMES
        or len(WARNED_NAMES) >= MAX_WARNED_NAMES
    ):
        return
    age_s = (perf_counter_ns() - context.started_ns) / 1e9
    if context.started_ns and age_s > MAX_SHADOW_AGE_S:
        WARNED_NAMES.add(name)
        logger.warning(
            "%s is held back %d s after its shadow request; what serves users too must be started outside of requests, or "
            "with context=contextvars.Context() (logged once)",
            name,
            age_s,
        )
