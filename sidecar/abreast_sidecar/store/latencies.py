"""Times of pairs, as the ledger has them."""

from __future__ import annotations

from abreast_sidecar.compare.latency import Timing
from abreast_sidecar.errors import NotFoundError
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.results import Endpoint, Window

MOST = 20_000  # pairs of an endpoint, the newest


async def timings(database: Database, endpoint: Endpoint, window: Window) -> tuple[list[Timing], bool]:
    """In the order of their arrival, and whether there are older pairs. Raise NotFoundError where there is none."""
    asked = {
        "service": endpoint.service,
        "method": endpoint.method,
        "route": endpoint.route,
        "start": window.start,
        "end": window.end,
        "limit": MOST,
    }
    rows = await database.rows("pair_times", asked)
    if not rows:
        raise NotFoundError(
            f"the ledger has no pair with both times of {endpoint.method} {endpoint.route} of {endpoint.service}"
        )
    more = [row.pop("more") for row in rows]
    return [Timing(**row) for row in rows], more[0]
