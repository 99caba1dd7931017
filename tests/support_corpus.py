"""The labelled pairs of tests/corpus, as captures with the expected differences."""

from __future__ import annotations

import copy
import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import brotli  # type: ignore[import-untyped]  # it has no types
import yaml
import zstandard

from abreast.protocol.capture import Answer, Body, Capture, Headers, Request, Version
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions

CORPUS = Path(__file__).parent / "corpus"
REMOVED = {"$removed": True}
Label = Literal["regression", "additive", "harmless", "unknown", "noise"]


@dataclass(frozen=True)
class Pair:
    """A pair of answers with its label.

    `expected` has part, path, kind and impact of each difference that the owner of the API should see. `actual` has the
    differences that are reported instead, if they are known to be wrong. A `regression` harms users. An `unknown` pair
    can't be compared, as its outcome tells. Only statistics can detect `noise`.
    """

    name: str
    label: Label
    old: Capture
    new: Capture
    expected: frozenset[str]
    outcome: str
    actual: frozenset[str] | None = None

    def compare(self) -> ComparisonResult:
        return compare_pair([self.old, self.new], CompareOptions())


def describe_differences(result: ComparisonResult) -> frozenset[str]:
    return frozenset(f"{item.part} {item.path or '-'} {item.kind} {item.impact}" for item in result.differences)


def pairs() -> list[Pair]:
    shapes = _yaml("shapes")
    corpus = [_of_shape(case, shapes) for case in _yaml("apis")]
    corpus += [_of_bodies(case) for case in _yaml("bodies")]
    return corpus + [_of_answers(case) for name in ("answers", "services") for case in _yaml(name)]


def _yaml(name: str) -> Any:
    return yaml.load((CORPUS / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)


def _pair(case: dict[str, Any], old: Answer, new: Answer) -> Pair:
    sides = {side: case[side] for side in ("old", "new") if isinstance(case.get(side), dict)}
    expected = frozenset(case.get("expect", ()))
    return Pair(
        name=case["name"],
        label=case["label"],
        old=_capture("old", case, old, sides.get("old", {})),
        new=_capture("new", case, new, sides.get("new", {})),
        expected=expected,
        outcome=case.get("outcome", "mismatch" if expected or "actual" in case else "match"),
        actual=frozenset(case["actual"]) if "actual" in case else None,
    )


def _capture(version: Version, case: dict[str, Any], answer: Answer, side: dict[str, Any]) -> Capture:
    return Capture(
        pair=case["name"],
        service="corpus",
        version=version,
        role="live" if version == "old" else "shadow",
        request=Request(
            case.get("method", "GET"), "/products/7", route="/products/{id}", headers=_headers(case.get("asked", {}))
        ),
        answer=answer,
        complete=side.get("complete", True),
        exception=side.get("raised", ""),
    )


def _headers(headers: dict[str, str | list[str]]) -> Headers:
    return tuple(
        (name, value)
        for name, values in headers.items()
        for value in (values if isinstance(values, list) else [values])
    )


def _answer(body: bytes, kind: str, status: int = 200, headers: Headers = (), trailers: Headers = ()) -> Answer:
    content_type = (("content-type", kind),) if kind else ()
    return Answer(status, (*content_type, *headers), Body(body, len(body)), trailers)


def _of_shape(case: dict[str, Any], shapes: dict[str, Any]) -> Pair:
    old = shapes[case["shape"]]
    new = _changed(old, case)
    kind = case.get("type", "application/json")
    return _pair(case, _answer(_written(old, []), kind), _answer(_written(new, case.get("render", [])), kind))


def _changed(document: Any, case: dict[str, Any]) -> Any:
    holder = {"": copy.deepcopy(document)}
    for pointer, value in case.get("change", {}).items():
        _set(holder, pointer, value)
    if "shuffle" in case:
        within, key = _at(holder, case["shuffle"])
        within[key] = within[key][::-1] if len(within[key]) < 3 else within[key][1:] + within[key][:1]
    return holder[""]


def _at(holder: Any, pointer: str) -> tuple[Any, Any]:
    within, key = holder, ""
    for step in pointer.split("/")[1:]:
        within = within[key]
        key = cast("Any", int(step)) if isinstance(within, list) and step != "-" else step
    return within, key


def _set(holder: Any, pointer: str, value: Any) -> None:
    within, key = _at(holder, pointer)
    if value == REMOVED:
        del within[key]
    elif key == "-":
        within.append(value)
    else:
        within[key] = value


def _written(document: Any, how: str | list[str]) -> bytes:
    if "sorted" in how:
        document = _reordered(document)
    indent = 2 if "indented" in how else None
    separators = None if indent else (",", ":")
    text = json.dumps(document, ensure_ascii="ascii" in how, indent=indent, separators=separators)
    return text.encode()


def _reordered(value: Any) -> Any:
    if isinstance(value, dict):
        keys = sorted(value)
        random.Random(1).shuffle(keys)
        return {key: _reordered(value[key]) for key in keys}
    return [_reordered(element) for element in value] if isinstance(value, list) else value


def _of_bodies(case: dict[str, Any]) -> Pair:
    kind = case.get("type", "application/json")
    old, new = (_answer(_bytes(case, side), case.get(f"{side}_type", kind)) for side in ("old", "new"))
    return _pair(case, old, new)


def _bytes(case: dict[str, Any], side: str) -> bytes:
    if "nest" in case:
        inner = b"1" if side == "old" else b" 1" if case.get("same") else b"2"
        levels: int = case["nest"]
        return b"[" * levels + inner + b"]" * levels
    if f"{side}_bytes" in case:
        return bytes.fromhex(str(case[f"{side}_bytes"]))
    text: str = case[side]
    return text.encode()


def _of_answers(case: dict[str, Any]) -> Pair:
    old, new = (_whole(case[side]) for side in ("old", "new"))
    return _pair(case, old, new)


def _whole(side: dict[str, Any]) -> Answer:
    body = side["body"].encode() if "body" in side else b"1" * side.get("repeat", 0)
    body = bytes.fromhex(str(side["bytes"])) if "bytes" in side else body
    headers = _headers(side.get("headers", {}))
    if "encode" in side:
        body = _encoded(body, side)
        headers = (*headers, *(("content-encoding", coding) for coding in side["encode"].split(",")))
    return _answer(
        body, side.get("type", "application/json"), side.get("status", 200), headers, _headers(side.get("trailers", {}))
    )


def _encoded(body: bytes, side: dict[str, Any]) -> bytes:
    codings: dict[str, Callable[[bytes], bytes]] = {
        "br": brotli.compress,
        "deflate": zlib.compress,
        "gzip": lambda plain: gzip.compress(plain, side.get("level", 6), mtime=0),
        "zstd": zstandard.compress,
    }
    for coding in side["encode"].split(","):
        body = codings[coding](body)
    return body
