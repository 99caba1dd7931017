"""Stored answers, judged again by the rules that hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import structlog
from psycopg import AsyncConnection

from abreast_sidecar.compare import CompareOptions, ComparisonResult, Difference, compare_pair
from abreast_sidecar.rejudge.places import NO_RULE, Attribution
from abreast_sidecar.store import PairRecord
from abreast_sidecar.store.catalogue import IdCache
from abreast_sidecar.store.database import CONNECT_TIMEOUT_S, Row, map_postgres_errors
from abreast_sidecar.store.rollup import COMPARED_OUTCOMES
from abreast_sidecar.store.unpack import read_captures

log = structlog.get_logger(__name__)


class FindingIds:
    """Ids of findings that were not seen before, made in transactions of their own."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self.id_cache = IdCache()

    async def load(self, records: Sequence[PairRecord]) -> None:
        if not records:
            return
        with map_postgres_errors():
            async with await AsyncConnection.connect(
                self._conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, prepare_threshold=None
            ) as connection:
                await self.id_cache.load(connection, records)


def reevaluate_row(row: Row, rules: CompareOptions) -> PairRecord | None:
    """None where the answers are not kept, or can't be held against each other by this code."""
    result = recompare(row["captures"], rules)
    if result is None or row["outcome"] not in COMPARED_OUTCOMES:
        return None
    return PairRecord(row["service"], "", round(row["at"].timestamp() * 1000), row["id"], result, ())


def recompare(captures: bytes | None, rules: CompareOptions) -> ComparisonResult | None:
    if captures is None:
        return None
    try:
        decoded_captures = read_captures(captures)
        result = compare_pair(decoded_captures, rules) if decoded_captures else None
    except Exception as error:  # noqa: BLE001  # one example must not stop the others
        log.warning("an example can't be judged again", error=str(error))
        return None
    return result if result is not None and result.outcome in COMPARED_OUTCOMES else None


def attribute_findings(
    record: PairRecord, id_cache: IdCache, drifted_findings: Collection[int] = ()
) -> Attribution:
    """Of a pair whose findings the catalogue has learned; without those that asking again told to be drift."""
    endpoint = id_cache.endpoint(record.endpoint)

    def attribute(unexplained: Iterable[Difference], explained: Iterable[Difference]) -> dict[int, int]:
        rule_ids: dict[int, int] = {}
        for difference in [*unexplained, *explained]:
            finding = id_cache.finding(endpoint, difference)
            if finding is not None and finding not in drifted_findings:
                rule_ids.setdefault(
                    finding, int(difference.explained_by) if difference.explained_by else NO_RULE
                )
        return rule_ids

    result = record.result
    return Attribution(
        attribute(result.differences, result.explained_differences),
        attribute(result.noise, result.explained_noise),
    )


def reevaluate_rows(rows: Sequence[Row], rules: CompareOptions) -> list[PairRecord | None]:
    return [reevaluate_row(row, rules) for row in rows]
