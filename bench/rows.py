"""What a measurement says: one row of results.json."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
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


def end_in_order() -> None:
    """At SIGTERM and SIGHUP like at Ctrl-C: servers are stopped and their folders removed."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, lambda number, _frame: sys.exit(128 + number))


def main(rows: Callable[..., Sequence[Row]]) -> None:
    """The command of one part: print its rows, one a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    end_in_order()
    for each in rows(quick=parser.parse_args().quick):
        print(json.dumps(each), flush=True)
