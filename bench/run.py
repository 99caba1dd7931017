"""Measures what there is to measure: python bench/run.py [--quick]. Prints a table and writes bench/results.json.

Part by part: the middleware in-process, Redis → compare → Postgres, comparing bodies, a rollback, and a flood of copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import compare
import middleware
import pipeline
import traffic

RESULTS = Path(__file__).parent / "results.json"


def measured(quick: bool) -> list[dict[str, Any]]:
    found: list[Any] = [*middleware.rows(*([5] if quick else []))]
    found += pipeline.bench(runs=1 if quick else 3, count=5_000 if quick else 20_000)
    found += compare.rows()
    found += traffic.bench(quick=quick)
    return [dict(row) for row in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    rows = measured(parser.parse_args().quick)
    for row in rows:
        print(
            f"{row['name']:32} {row['value']:>12,.2f} {row['unit']:8} {row['min']:,.2f} … {row['max']:,.2f} ({row['runs']} runs)"
        )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
