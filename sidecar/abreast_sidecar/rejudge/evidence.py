"""Stored answers, judged again by the rules that hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import structlog
from psycopg import AsyncConnection

from abreast_sidecar.compare import Difference, Judgement, Rules, judge
from abreast_sidecar.rejudge.places import NOBODY, Places
from abreast_sidecar.store import Judged
from abreast_sidecar.store.catalogue import Catalogue
from abreast_sidecar.store.database import CONNECT_TIMEOUT, Row, translated
from abreast_sidecar.store.rollup import COMPARED
from abreast_sidecar.store.unpack import unpack

log = structlog.get_logger(__name__)


class Learning:
    """Ids of findings that were not seen before, made in transactions of their own."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self.catalogue = Catalogue()

    async def learn(self, batch: Sequence[Judged]) -> None:
        if not batch:
            return
        with translated():
            async with await AsyncConnection.connect(
                self._conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT, prepare_threshold=None
            ) as connection:
                await self.catalogue.learn(connection, batch)


def judged_again(row: Row, rules: Rules) -> Judged | None:
    """None where the answers are not kept, or can't be held against each other by this code."""
    judgement = again(row["captures"], rules)
    if judgement is None or row["outcome"] not in COMPARED:
        return None
    return Judged(row["service"], "", round(row["at"].timestamp() * 1000), row["id"], judgement, ())


def again(captures: bytes | None, rules: Rules) -> Judgement | None:
    if captures is None:
        return None
    try:
        found = unpack(captures)
        judgement = judge(found, rules) if found else None
    except Exception as error:  # noqa: BLE001  # one example must not stop the others
        log.warning("an example can't be judged again", error=str(error))
        return None
    return judgement if judgement is not None and judgement.outcome in COMPARED else None


def places(judged: Judged, catalogue: Catalogue, drift: Collection[int] = ()) -> Places:
    """Of a pair whose findings the catalogue has learned; without those that asking again told to be drift."""
    endpoint = catalogue.endpoint(judged.endpoint)

    def of(left: Iterable[Difference], explained: Iterable[Difference]) -> dict[int, int]:
        found: dict[int, int] = {}
        for one in [*left, *explained]:
            finding = catalogue.finding(endpoint, one)
            if finding is not None and finding not in drift:
                found.setdefault(finding, int(one.explained_by) if one.explained_by else NOBODY)
        return found

    judgement = judged.judgement
    return Places(
        of(judgement.differences, judgement.explained), of(judgement.noise, judgement.noise_explained)
    )


def all_judged(rows: Sequence[Row], rules: Rules) -> list[Judged | None]:
    return [judged_again(row, rules) for row in rows]
