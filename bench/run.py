"""Run all benchmarks: python bench/run.py [--quick] [--minutes N]. Print a table and write bench/results.json.

The first parts are the middleware in-process and behind uvicorn, mirroring through Envoy, and the pipeline from Redis to
Postgres. The others are everyday rates, comparison, verdicts, both ways of capture, rollback and overload, what a proxy
changes, a large ledger, and memory (bench/memory.svg).
Within a part, variants that are compared take turns. The first rows contain the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import asgi
import captures
import compare
import everyday
import growth
import machine
import memory
import middleware
import mirror
import pipeline
import quality
import traffic
import transparency
from rows import Row, end_in_order

RESULTS = Path(__file__).parent / "results.json"
MINUTES, QUICK_MINUTES = 10.0, 0.05  # duration of the memory measurement
STABLE = {
    "basehttp_us",
    "deepdiff_ratio",
    "diff_2kb_us",
    "diff_50kb_us",
    "middleware_sampled_us",
    "middleware_throughput_ratio",
    "middleware_unsampled_us",
    "mirror_p50_ratio",
    "mirror_p99_ratio",
    "otel_us",
    "pipeline_pairs_per_s",
    "pipeline_worker_us",
    "rollback_ms",
    "visible_p99_ms",
}  # names that other tools read


def parts(quick: bool, minutes: float) -> dict[str, Callable[[], Sequence[Row]]]:
    return {
        "machine": machine.rows,
        "middleware": lambda: middleware.rows(quick=quick),
        "asgi": lambda: asgi.rows(quick=quick),
        "mirror": lambda: mirror.rows(quick=quick),
        "pipeline": lambda: pipeline.rows(quick=quick),
        "everyday": lambda: everyday.rows(quick=quick),
        "compare": lambda: compare.rows(quick=quick),
        "quality": lambda: quality.rows(quick=quick),
        "captures": lambda: captures.rows(quick=quick),
        "traffic": lambda: traffic.rows(quick=quick),
        "transparency": lambda: transparency.rows(quick=quick),
        "growth": lambda: growth.rows(quick=quick),
        "memory": lambda: memory.rows(minutes),
    }


def measure(quick: bool, minutes: float) -> Iterator[Row]:
    for name, part in parts(quick, minutes).items():
        began = time.monotonic()
        yield from part()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same rows from fewer and shorter runs")
    parser.add_argument("--minutes", type=float, help="duration of the memory measurement")
    arguments = parser.parse_args()
    end_in_order()
    minutes = arguments.minutes or (QUICK_MINUTES if arguments.quick else MINUTES)
    rows = []
    for row in measure(arguments.quick, minutes):
        rows.append(row)
        print(
            f"{row['name']:38} {row['value']:>12,.2f} {row['unit']:8} {row['min']:,.2f} … {row['max']:,.2f} ({row['runs']} runs)",
            flush=True,
        )
    if missing := STABLE - {row["name"] for row in rows}:
        print(f"not measured: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
