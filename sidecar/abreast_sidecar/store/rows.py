"""Turns rows of the ledger into results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from abreast_sidecar.compare.verdict import EndpointCounts
from abreast_sidecar.store.database import Row
from abreast_sidecar.store.results import (
    Endpoint,
    EndpointSummary,
    Explanation,
    Finding,
    StoredDifference,
    StoredPair,
    StoredPairDetail,
)
from abreast_sidecar.store.unpack import read_captures

MAX_EXPLANATIONS = 10


def to_endpoint(row: Row) -> Endpoint:
    return Endpoint(row["service"], row["method"], row["route"])


def to_endpoint_counts(row: Row) -> EndpointCounts:
    numbers = {name: value for name, value in row.items() if name not in {"method", "route"}}
    return EndpointCounts(endpoint=f"{row['method']} {row['route']}", **numbers)


def to_endpoint_summary(row: Row) -> EndpointSummary:
    return EndpointSummary(
        endpoint=to_endpoint(row),
        outcomes=row["outcomes"] or {},
        findings=row["findings"],
        old_us=_to_percentiles(row["old_us"]),
        new_us=_to_percentiles(row["new_us"]),
    )


def _to_percentiles(values: Sequence[float | None] | None) -> tuple[float, float] | None:
    if not values or values[0] is None or values[1] is None:
        return None
    return values[0], values[1]


def to_finding(row: Row) -> Finding:
    return Finding(
        id=row["id"],
        endpoint=to_endpoint(row),
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
        explanations=tuple(_iter_explanations(row))[:MAX_EXPLANATIONS],
    )


def _iter_explanations(row: Row) -> Iterator[Explanation]:
    if row["status"] in {"expected", "fixed"}:
        yield Explanation(row["status"], row["count"], row["status_reason"])
    elif row["state"] == "noise" and row["status"] != "confirmed" and row["count"] + row["baseline_count"]:
        cause = "shape" if row["shape_explained"] and not row["baseline_count"] else "noise"
        yield Explanation(cause, row["count"], row["reason"])
    for rule in row["rules"] or ():
        yield Explanation("rule", **rule)
    if row["drift_pairs"]:
        yield Explanation("drift", row["drift_pairs"], "asked again, both versions agreed")


def to_pair(row: Row) -> StoredPair:
    return StoredPair(
        id=row["id"],
        endpoint=to_endpoint(row),
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


def to_pair_detail(row: Row) -> StoredPairDetail:
    noise_keys, drift_keys = set(row["noisy"]), set(row["drifted"])
    return StoredPairDetail(
        pair=to_pair(row),
        captures=() if row["captures"] is None else read_captures(row["captures"]),
        differences=tuple(
            to_difference(record, noise_keys, drift_keys) for record in row["differences"] or ()
        ),
    )


def to_difference(record: Row, noise_keys: set[str], drift_keys: set[str]) -> StoredDifference:
    finding = f"{record['part']} {record['kind']} {record['path']}"
    return StoredDifference(
        part=record["part"],
        path=record["path"],
        exact_path=record["place"],
        kind=record["kind"],
        impact=record["impact"],
        old=record.get("old"),
        new=record.get("new"),
        is_noise=finding in noise_keys,
        rule_id=int(record.get("explained_by") or 0),
        is_drift=finding in drift_keys,
    )
