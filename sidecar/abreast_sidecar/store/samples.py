"""Which requests of a batch leave their features, to find what those with a finding have in common.

Each finding and each endpoint has so many slots. In one process the first requests fill them and later ones replace any,
ever more rarely (Vitter 1985, "Random sampling with a reservoir", algorithm R) but never more rarely than one in
RAREST: what is kept is a sample of the last thousands, and what is written has a bound.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from abreast_sidecar.compare.request import of_request
from abreast_sidecar.store.clean import json_text
from abreast_sidecar.store.judged import Judged
from abreast_sidecar.store.rollup import COMPARED

SLOTS = 200
RAREST = 50
ANY = 0  # in place of a finding: any request of the endpoint


class Samples:
    def __init__(self, seed: int | None = None) -> None:
        self._seen: dict[tuple[int, int], int] = {}  # endpoint, finding → requests
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def clear(self) -> None:
        self._seen.clear()

    def choose(self, batch: Iterable[tuple[Judged, int, list[int]]]) -> list[dict[str, Any]]:
        """Rows of `request_sample`; the batch has pairs, their endpoints and findings."""
        rows: dict[tuple[int, int, int], dict[str, Any]] = {}
        for judged, endpoint, findings in batch:
            if judged.judgement.outcome not in COMPARED:
                continue
            kept = [
                (endpoint, finding, slot)
                for finding in (ANY, *findings)
                if (slot := self._slot(endpoint, finding)) is not None
            ]
            if kept:
                known = {"ms": judged.at, "findings": findings, "features": _features(judged)}
                rows |= {
                    key: dict(zip(("endpoint_id", "finding_id", "slot"), key, strict=True)) | known
                    for key in kept
                }
        return list(rows.values())

    def _slot(self, endpoint: int, finding: int) -> int | None:
        seen = self._seen.get((endpoint, finding), 0)
        self._seen[endpoint, finding] = seen + 1
        if seen < SLOTS:
            return seen
        chosen = int(
            self._random.random() * min(seen + 1, SLOTS * RAREST)
        )  # randrange takes ten times as long
        return chosen if chosen < SLOTS else None


def parameters(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {"rows": json_text(rows).decode()}


def _features(judged: Judged) -> dict[str, list[str]]:
    judgement = judged.judgement
    shown = judgement.old or judgement.new
    return of_request(shown.request, judgement.route) if shown else {}
