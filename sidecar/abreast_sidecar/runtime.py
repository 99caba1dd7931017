"""What the processes that compare have in common: a quick event loop, and a garbage collector that seldom walks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

# Allocations between two collections. Captures and differences hold no cycles, so that next to all of what a collection
# walks is alive; with the default of 700 that was a fifth of a worker's time.
GC_THRESHOLDS = (50_000, 20, 50)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Like asyncio.run, for a process of the sidecar's own; what was imported until now is never collected."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=_find_loop_factory()) as runner:
        runner.run(main)


def _find_loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    return uvloop.new_event_loop
