"""What a measurement says: one row of results.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict


class Row(TypedDict):
    """`value` is the median of the runs."""

    name: str
    value: float
    unit: str
    min: float
    max: float
    runs: int


def row(name: str, unit: str, values: Sequence[float]) -> Row:
    return {
        "name": name,
        "value": round(statistics.median(values), 3),
        "unit": unit,
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "runs": len(values),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
