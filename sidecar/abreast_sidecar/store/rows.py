"""Turns rows of the ledger into results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from abreast_sidecar.compare.verdict import Counts
from abreast_sidecar.store.database import Row
from abreast_sidecar.store.results import (
    Difference,
    Endpoint,
    EndpointSummary,
    Explanation,
    Finding,
    Pair,
    PairDetail,
)
from abreast_sidecar.store.unpack import unpack

MAX_EXPLANATIONS = 10


def endpoint(row: Row) -> Endpoint:
    return Endpoint(row["service"], row["method"], row["route"])


def counts(row: Row) -> Counts:
    numbers = {name: value for name, value in row.items() if name not in {"method", "route"}}
    return Counts(endpoint=f"{row['method']} {row['route']}", **numbers)


def endpoint_summary(row: Row) -> EndpointSummary:
    return EndpointSummary(
        endpoint=endpoint(row),
        outcomes=row["outcomes"] or {},
        findings=row["findings"],
        old_us=_percentiles(row["old_us"]),
        new_us=_percentiles(row["new_us"]),
    )


def _percentiles(values: Sequence[float | None] | None) -> tuple[float, float] | None:
    if not values or values[0] is None or values[1] is None:
        return None
    return values[0], values[1]


def finding(row: Row) -> Finding:
    return Finding(
        id=row["id"],
        endpoint=endpoint(row),
        part=row["part"],
        path=row["path"],
        kind=row["kind"],
        impact=row["impact"],
        count=row["count"],
        compared=row["compared"],
        baseline_count=row["baseline_count"],
        state=row["state"],
        reason=row["reason"],
        first_seen=row["first_seen"],
        last_seen=row["last_seen"],
        detail=row["detail"],
        status=row["status"],
        status_reason=row["status_reason"],
        old_releases=tuple(row["old_releases"]),
        new_releases=tuple(row["new_releases"]),
        explanations=tuple(_explanations(row))[:MAX_EXPLANATIONS],
    )


def _explanations(row: Row) -> Iterator[Explanation]:
    if row["status"] in {"expected", "fixed"}:
        yield Explanation(row["status"], row["count"], row["status_reason"])
    elif row["state"] == "noise" and row["status"] != "confirmed" and row["count"] + row["baseline_count"]:
        cause = "shape" if row["shape_explained"] and not row["baseline_count"] else "noise"
        yield Explanation(cause, row["count"], row["reason"])
    for rule in row["rules"] or ():
        yield Explanation("rule", **rule)
    if row["drift_pairs"]:
        yield Explanation("drift", row["drift_pairs"], "asked again, both versions agreed")


def pair(row: Row) -> Pair:
    return Pair(
        id=row["id"],
        endpoint=endpoint(row),
        at=row["at"],
        outcome=row["outcome"],
        live=row["live"] or "",
        request=row["request"],
        old_status=row["old_status"] or 0,
        new_status=row["new_status"] or 0,
        old_us=row["old_us"],
        new_us=row["new_us"],
        old_release=row["old_release"],
        new_release=row["new_release"],
        findings=tuple(row["findings"]),
        reason=row["reason"],
        explained=tuple(zip(row["explained"] or (), row["explained_by"] or (), strict=True)),
        drift=tuple(row["drift"] or ()),
    )


def pair_detail(row: Row) -> PairDetail:
    noisy, drifted = set(row["noisy"]), set(row["drifted"])
    return PairDetail(
        pair=pair(row),
        captures=() if row["captures"] is None else unpack(row["captures"]),
        differences=tuple(difference(found, noisy, drifted) for found in row["differences"] or ()),
    )


def difference(found: Row, noisy: set[str], drifted: set[str]) -> Difference:
    finding = f"{found['part']} {found['kind']} {found['path']}"
    return Difference(
        part=found["part"],
        path=found["path"],
        place=found["place"],
        kind=found["kind"],
        impact=found["impact"],
        old=found.get("old"),
        new=found.get("new"),
        noise=finding in noisy,
        rule=int(found.get("explained_by") or 0),
        drift=finding in drifted,
    )
