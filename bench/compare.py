"""What a comparison costs, and how well it tells regressions from harmless changes: python bench/compare.py [--quick]."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import orjson
from rows import Row, main, row

from abreast.protocol.capture import Answer, Body
from abreast_sidecar.compare.body import compare_bodies
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.values import encode_canonical

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RUNS, QUICK_RUNS = 60, 15  # rounds, in each of which everything is measured once
SLOW_RUNS = 8  # rounds with deepdiff


def order(lines: int) -> dict[str, Any]:
    """An order of a shop: 2 KB with 9 lines."""
    return {
        "order": {
            "id": "0d7c1e3a-0000-4000-8000-000000000001",
            "status": "paid",
            "customer": {"name": "Ada Example", "email": "ada@example.org", "verified": True},
        },
        "lines": [
            {
                "sku": f"SKU-{n:05}",
                "title": "A product with a longer name, in several words",
                "price": 19.9 + n,
                "quantity": 1 + n % 3,
                "image": f"https://cdn.example.org/images/products/{n:08}/large.jpg",
                "gift": False,
            }
            for n in range(lines)
        ],
        "total": 199.5,
        "currency": "EUR",
        "next": None,
    }


def changed(document: dict[str, Any]) -> dict[str, Any]:
    """Three differences."""
    other: dict[str, Any] = json.loads(json.dumps(document))
    other["lines"][3]["price"] = 1.5
    other["lines"][-2]["title"] = "x"
    other["total"] = "199.5"
    return other


def measured(works: dict[str, Callable[[], Any]], *, number: int, runs: int) -> dict[str, list[float]]:
    """µs of one call, in each round: interleaved, so that a busy machine is busy for all."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    gc.disable()
    try:
        for _ in range(runs):
            for name, work in works.items():
                start = perf_counter_ns()
                for _ in range(number):
                    work()
                taken[name].append((perf_counter_ns() - start) / number / 1000)
    finally:
        gc.enable()
    return taken


def walked(old: Any, new: Any) -> list[tuple[Any, Any]]:
    """The reference: no paths, no order, nothing kept; skips what has the same canonical text."""
    if type(old) is type(new) and encode_canonical(old) == encode_canonical(new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [found for key in old.keys() & new.keys() for found in walked(old[key], new[key])]
    if isinstance(old, list) and isinstance(new, list):
        return [found for one, other in zip(old, new, strict=False) for found in walked(one, other)]
    return [(old, new)]


def speed(runs: int) -> list[Row]:
    rows = []
    for size, lines, number in (("2kb", 9, 100), ("50kb", 230, 5)):
        old, new = (orjson.dumps(one) for one in (order(lines), changed(order(lines))))
        taken = measured(_works(old, new), number=number, runs=runs)
        rows += [row(f"{name}_{size}_us", "us", values) for name, values in taken.items()]
    return rows


def _works(old: bytes, new: bytes) -> dict[str, Callable[[], Any]]:
    rules = CompareOptions()
    headers = (("content-type", "application/json"),)
    before, after, same = (Answer(200, headers, Body(body, len(body))) for body in (old, new, bytes(bytearray(old))))
    assert len(compare_bodies(before, after, rules).differences) == 3
    return {
        "diff": lambda: compare_bodies(before, after, rules),
        "equal_bytes": lambda: compare_bodies(before, same, rules),
        "parse_and_equals": lambda: orjson.loads(old) == orjson.loads(new),
        "parse_and_walk": lambda: walked(orjson.loads(old), orjson.loads(new)),
    }


def against_deepdiff() -> list[Row]:
    """How many times faster than deepdiff at 2 KB; nothing where it is not installed.

    As it comes, and told that order means nothing, which is what finds a new order of a list.
    """
    if importlib.util.find_spec("deepdiff") is None:
        return []
    DeepDiff = importlib.import_module("deepdiff").DeepDiff  # noqa: N806  # a class

    old, new = (orjson.dumps(one) for one in (order(9), changed(order(9))))
    works = {
        "diff": _works(old, new)["diff"],
        "deepdiff": lambda: DeepDiff(orjson.loads(old), orjson.loads(new)),
        "deepdiff_unordered": lambda: DeepDiff(orjson.loads(old), orjson.loads(new), ignore_order=True),
    }
    taken = measured(works, number=20, runs=SLOW_RUNS)
    rows = []
    for name in ("deepdiff", "deepdiff_unordered"):
        ratios = [slow / fast for slow, fast in zip(taken[name], taken["diff"], strict=True)]
        rows += [row(f"{name}_us", "us", taken[name]), row(f"{name}_ratio", "times", ratios)]
    return rows


def quality() -> list[Row]:
    """Over the labelled pairs of tests/corpus, without those that only learning tells."""
    from support_corpus import describe_differences, pairs

    right = wrong = missed = 0
    known = [pair for pair in pairs() if pair.label != "noise"]
    for pair in known:
        expected, got = (
            {text.replace("$*", "$" + "[*]" * 150) for text in pair.expected},
            describe_differences(pair.compare()),
        )
        right += len(expected & got)
        wrong += len(got - expected)
        missed += len(expected - got)
    return [
        row("corpus_precision", "share", [right / (right + wrong)]),
        row("corpus_recall", "share", [right / (right + missed)]),
        row("corpus_pairs", "pairs", [float(len(known))]),
    ]


def rows(*, quick: bool = False) -> list[Row]:
    return [*speed(QUICK_RUNS if quick else RUNS), *against_deepdiff(), *quality()]


if __name__ == "__main__":
    main(rows)
