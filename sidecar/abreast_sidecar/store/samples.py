"""Which requests of a batch leave their features, to find what those with a finding have in common.

Each finding and each endpoint has so many slots. In one process the first requests fill them and later ones replace any,
ever more rarely (Vitter 1985, "Random sampling with a reservoir", algorithm R) but never more rarely than one in
RAREST: what is kept is a sample of the last thousands, and what is written has a bound.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from abreast_sidecar.compare.request import collect_request_features
from abreast_sidecar.store.clean import to_json
from abreast_sidecar.store.judged import PairRecord
from abreast_sidecar.store.rollup import COMPARED_OUTCOMES

SLOTS_PER_KEY = 200
MAX_SAMPLING_INTERVAL = 50
ANY_FINDING = 0  # in place of a finding: any request of the endpoint


class RequestSampler:
    def __init__(self, seed: int | None = None) -> None:
        self._seen_counts: dict[tuple[int, int], int] = {}  # endpoint, finding → requests
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def clear(self) -> None:
        self._seen_counts.clear()

    def sample(self, records: Iterable[tuple[PairRecord, int, list[int]]]) -> list[dict[str, Any]]:
        """Rows of `request_sample`; the batch has pairs, their endpoints and findings."""
        rows: dict[tuple[int, int, int], dict[str, Any]] = {}
        for record, endpoint, findings in records:
            if record.result.outcome not in COMPARED_OUTCOMES:
                continue
            keys = [
                (endpoint, finding, slot)
                for finding in (ANY_FINDING, *findings)
                if (slot := self._pick_slot(endpoint, finding)) is not None
            ]
            if keys:
                columns = {"ms": record.time_ms, "findings": findings, "features": _extract_features(record)}
                rows |= {
                    key: dict(zip(("endpoint_id", "finding_id", "slot"), key, strict=True)) | columns
                    for key in keys
                }
        return list(rows.values())

    def _pick_slot(self, endpoint: int, finding: int) -> int | None:
        seen_count = self._seen_counts.get((endpoint, finding), 0)
        self._seen_counts[endpoint, finding] = seen_count + 1
        if seen_count < SLOTS_PER_KEY:
            return seen_count
        slot = int(
            self._random.random() * min(seen_count + 1, SLOTS_PER_KEY * MAX_SAMPLING_INTERVAL)
        )  # randrange takes ten times as long
        return slot if slot < SLOTS_PER_KEY else None


def make_sample_parameters(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {"rows": to_json(rows).decode()}


def _extract_features(record: PairRecord) -> dict[str, list[str]]:
    result = record.result
    capture = result.old or result.new
    return collect_request_features(capture.request, result.route) if capture else {}
