"""Times of pairs, as the ledger has them."""

from __future__ import annotations

from dataclasses import dataclass

from abreast_sidecar.compare.latency import Timing
from abreast_sidecar.errors import NotFoundError
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.results import Endpoint, Window

MOST = 20_000  # pairs of an endpoint, the newest


@dataclass(frozen=True, slots=True)
class Timings:
    """In the order of their arrival. `copy_ratio` is None where too few copies of old are known to say."""

    pairs: list[Timing]
    cut: bool  # whether there are more
    copy_ratio: float | None


async def timings(database: Database, endpoint: Endpoint, window: Window) -> Timings:
    """Raise NotFoundError where there is none."""
    asked = {
        "service": endpoint.service,
        "method": endpoint.method,
        "route": endpoint.route,
        "start": window.start,
        "end": window.end,
        "limit": MOST + 1,
    }
    rows = await database.rows("latency", asked)
    if not rows:
        raise NotFoundError(
            f"the ledger has no pair with both times of {endpoint.method} {endpoint.route} of {endpoint.service}"
        )
    names = ("old_us", "new_us", "release", "handicap")
    pairs = [Timing(*(row[name] for name in names)) for row in rows[-MOST:]]
    return Timings(pairs, len(rows) > MOST, rows[0]["copy_ratio"])
