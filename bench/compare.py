"""Measure the time of a comparison, and its precision and recall: python bench/compare.py [--quick]."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from time import perf_counter_ns
from typing import Any

import orjson
from rows import Row, main, row

from abreast.protocol.capture import Answer, Body
from abreast_sidecar.compare.body import compare_bodies
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.values import encode_canonical

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RUNS, QUICK_RUNS = 600, 60  # rounds that measure every function once; short ones, so that other load spares some
SLOW_RUNS = 8  # rounds with deepdiff


def order(lines: int) -> dict[str, Any]:
    """Return the order of a shop. It has 2 KB with 9 lines."""
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


def change(document: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with three differences."""
    other: dict[str, Any] = json.loads(json.dumps(document))
    other["lines"][3]["price"] = 1.5
    other["lines"][-2]["title"] = "x"
    other["total"] = "199.5"
    return other


def wide_object() -> dict[str, Any]:
    """Return an object with 1,000 fields of several types. It has 35 KB."""
    values = ("a text of some words", 12345, 19.9, True, None)
    names = islice(product(ascii_lowercase, repeat=3), 1000)
    return {f"field_{''.join(name)}_of_a_row": values[n % len(values)] for n, name in enumerate(names)}


def change_wide_object(document: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with three differences."""
    names = list(document)
    return document | {names[3]: "x", names[500]: "another text", names[-2]: False}


def measure(functions: dict[str, Callable[[], Any]], *, number: int, runs: int) -> dict[str, list[float]]:
    """Return the µs per call, one value per round. The functions take turns, so other load affects all of them alike."""
    times_us: dict[str, list[float]] = {name: [] for name in functions}
    gc.disable()
    try:
        for _ in range(runs):
            for name, function in functions.items():
                start = perf_counter_ns()
                for _ in range(number):
                    function()
                times_us[name].append((perf_counter_ns() - start) / number / 1000)
    finally:
        gc.enable()
    return times_us


def walk(old: Any, new: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of values that differ. A reference without paths and array alignment."""
    if type(old) is type(new) and encode_canonical(old) == encode_canonical(new):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [pair for key in old.keys() & new.keys() for pair in walk(old[key], new[key])]
    if isinstance(old, list) and isinstance(new, list):
        return [pair for old_item, new_item in zip(old, new, strict=False) for pair in walk(old_item, new_item)]
    return [(old, new)]


def speed(runs: int) -> list[Row]:
    rows = []
    pairs = {
        "2kb": (order(9), change(order(9)), 10),
        "50kb": (order(230), change(order(230)), 1),
        "wide": (wide_object(), change_wide_object(wide_object()), 1),
    }
    for size, (old, new, number) in pairs.items():
        times_us = measure(_list_functions(orjson.dumps(old), orjson.dumps(new)), number=number, runs=runs)
        rows += [row(f"{name}_{size}_us", "us", values) for name, values in times_us.items()]
        rows.append(row(f"diff_{size}_ratio", "times", [min(times_us["diff"]) / min(times_us["parse_and_equals"])]))
    return rows


def _list_functions(old: bytes, new: bytes) -> dict[str, Callable[[], Any]]:
    rules = CompareOptions()
    headers = (("content-type", "application/json"),)
    before, after, same = (Answer(200, headers, Body(body, len(body))) for body in (old, new, bytes(bytearray(old))))
    assert len(compare_bodies(before, after, rules).differences) == 3
    return {
        "diff": lambda: compare_bodies(before, after, rules),
        "equal_bytes": lambda: compare_bodies(before, same, rules),
        "parse_and_equals": lambda: orjson.loads(old) == orjson.loads(new),
        "parse_and_walk": lambda: walk(orjson.loads(old), orjson.loads(new)),
    }


def against_deepdiff() -> list[Row]:
    """Compare the speed with deepdiff at 2 KB, with and without `ignore_order`. Return nothing if it is not installed.

    Only `ignore_order` detects that a list has a new order.
    """
    if importlib.util.find_spec("deepdiff") is None:
        return []
    DeepDiff = importlib.import_module("deepdiff").DeepDiff  # noqa: N806  # a class

    old, new = orjson.dumps(order(9)), orjson.dumps(change(order(9)))
    functions = {
        "diff": _list_functions(old, new)["diff"],
        "deepdiff": lambda: DeepDiff(orjson.loads(old), orjson.loads(new)),
        "deepdiff_unordered": lambda: DeepDiff(orjson.loads(old), orjson.loads(new), ignore_order=True),
    }
    times_us = measure(functions, number=20, runs=SLOW_RUNS)
    rows = []
    for name in ("deepdiff", "deepdiff_unordered"):
        ratios = [slow / fast for slow, fast in zip(times_us[name], times_us["diff"], strict=True)]
        rows += [row(f"{name}_us", "us", times_us[name]), row(f"{name}_ratio", "times", ratios)]
    return rows


def quality() -> list[Row]:
    """Measure over the labelled pairs of tests/corpus, except noise, which a single comparison can't recognise."""
    from support_corpus import describe_differences, pairs

    right = wrong = missed = 0
    labelled = [pair for pair in pairs() if pair.label != "noise"]
    for pair in labelled:
        expected, reported = (
            {text.replace("$*", "$" + "[*]" * 150) for text in pair.expected},
            describe_differences(pair.compare()),
        )
        right += len(expected & reported)
        wrong += len(reported - expected)
        missed += len(expected - reported)
    return [
        row("corpus_precision", "share", [right / (right + wrong)]),
        row("corpus_recall", "share", [right / (right + missed)]),
        row("corpus_pairs", "pairs", [float(len(labelled))]),
    ]


def rows(*, quick: bool = False) -> list[Row]:
    return [*speed(QUICK_RUNS if quick else RUNS), *against_deepdiff(), *quality()]


if __name__ == "__main__":
    main(rows)
