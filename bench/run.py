"""Measures what there is to measure: python bench/run.py [--quick]. Prints a table and writes bench/results.json.

Part by part: the middleware in-process and behind uvicorn, users' times through Envoy and how soon a pair can be
queried, Redis → compare → Postgres, comparing bodies, a rollback, and a flood of copies. The first rows tell the machine
and the versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import asgi
import compare
import machine
import middleware
import mirror
import pipeline
import traffic

RESULTS = Path(__file__).parent / "results.json"


def measured(quick: bool) -> list[dict[str, Any]]:
    found: list[Any] = [*machine.rows(), *middleware.rows(*([5] if quick else []))]
    found += asgi.rows(quick=quick)
    found += mirror.rows(quick=quick)
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
