"""The rows of results.json, and the command line of each part."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import TypedDict


class Row(TypedDict):
    """One measurement. `value` is the median of the runs."""

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
    """Return the smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def end_in_order() -> None:
    """Exit on SIGTERM and SIGHUP like on Ctrl-C, so that servers stop and their folders are removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def main(rows: Callable[..., Sequence[Row]]) -> None:
    """Run the command of one part: print its rows, one per line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    end_in_order()
    for result in rows(quick=parser.parse_args().quick):
        print(json.dumps(result), flush=True)
