"""Times of pairs, as the ledger has them."""

from __future__ import annotations

from abreast_sidecar.compare.latency import Timing
from abreast_sidecar.errors import NotFoundError
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.results import Endpoint, Window

MAX_TIMINGS = 20_000  # pairs of an endpoint, the newest


async def read_timings(database: Database, endpoint: Endpoint, window: Window) -> tuple[list[Timing], bool]:
    """In the order of their arrival, and whether there are older pairs. Raise NotFoundError where there is none."""
    parameters = {
        "service": endpoint.service,
        "method": endpoint.method,
        "route": endpoint.route,
        "start": window.start,
        "end": window.end,
        "limit": MAX_TIMINGS,
    }
    rows = await database.fetch_all("pair_times", parameters)
    if not rows:
        raise NotFoundError(
            f"the ledger has no pair with both times of {endpoint.method} {endpoint.route} of {endpoint.service}"
        )
    has_older = [row.pop("more") for row in rows]
    return [Timing(**row) for row in rows], has_older[0]
