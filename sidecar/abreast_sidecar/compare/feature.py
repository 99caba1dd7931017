"""What the requests that show a finding have in common, and the others don't: `query.currency=JPY`.

Each feature of a request (`name=value`, `name` at all, no `name`) divides two samples into a table of four counts. Those
that are in most requests with the finding and in far fewer without it are kept if Fisher's exact test, one-sided, rejects
chance at ERROR divided by the number of features that were tried (Bonferroni). Of these the one is taken with the greatest
Youden index (coverage minus share among the others), and of equals the simplest: a value before a presence before an
absence, the query before the path, headers and body, the shorter name. The samples are of bounded size and drawn apart,
so precision is worked out from how many requests there were of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, lgamma
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

ERROR = 0.01  # that any feature is named where there is none
LEAST = 5  # requests with the finding, and without it
COVERAGE = 0.7  # of the requests with the finding
CONTRAST = 0.5  # the share among the others is at most this part of the coverage
CLOSE = 0.02  # Youden indices nearer than this are equal
LONGEST = 80  # characters of a value; longer ones name nothing
MOST_LEAVES = 200  # of one body
MOST_DEPTH = 8

Features = Mapping[str, Sequence[str]]  # every name with all of its values
Kind = Literal["value", "present", "absent"]

_KINDS: dict[Kind, int] = {"value": 0, "present": 1, "absent": 2}
_PLACES = {"query": 0, "path": 1, "header": 2, "cookie": 3, "body": 4}


@dataclass(frozen=True, slots=True)
class Feature:
    kind: Kind
    name: str  # query.currency, path.id, header.accept-language, body.items[*].sku
    value: str  # empty unless the kind is `value`
    coverage: float  # part of the requests with the finding that have the feature
    precision: float  # part of the requests with the feature that show the finding
    p_value: float  # corrected for the number of features that were tried

    def __str__(self) -> str:
        if self.kind == "value":
            return f"{self.name}={self.value}"
        return self.name if self.kind == "present" else f"no {self.name}"


def features(
    query: Iterable[tuple[str, str]] = (),
    path: Mapping[str, str] | None = None,
    headers: Iterable[tuple[str, str]] = (),
    body: Any = None,
) -> dict[str, list[str]]:
    """The features of one request: query parameters, path parameters, headers, and fields of a JSON or form body."""
    found: dict[str, list[str]] = {}
    for place, pairs in (("query", query), ("path", (path or {}).items()), ("header", headers)):
        for name, value in pairs:
            _put(found, f"{place}.{name.lower() if place == 'header' else name}", value)
    if body is not None:
        for name, value in islice(_leaves(body, "body", MOST_DEPTH), MOST_LEAVES):
            _put(found, name, value)
    return found


def of_target(target: str, route: str) -> dict[str, list[str]]:
    """The features of a path and query: `/prices/7?currency=JPY` by the template `/prices/{id}`."""
    path, _, query = target.partition("?")
    steps, names = path.split("/"), route.split("/")
    parameters = {
        name[1:-1].partition(":")[0]: unquote(step)
        for name, step in zip(names, steps, strict=False)
        if name.startswith("{") and name.endswith("}") and len(steps) == len(names)
    }
    return features(parse_qsl(query, keep_blank_values=True, max_num_fields=None), parameters)


def separating(
    shows: Sequence[Features], others: Sequence[Features], *, shows_in_all: int = 0, others_in_all: int = 0
) -> Feature | None:
    """The feature that best tells the requests that show a finding from those that don't, or None.

    `shows_in_all`, `others_in_all`: how many there were of each; the samples' sizes unless given. A few hundred of each
    are enough. Names that begin with query, path, header or body are preferred in that order.
    """
    if len(shows) < LEAST or len(others) < LEAST:
        return None
    names = {name for request in (*shows, *others) for name in request}
    with_it, without = _count(shows, names), _count(others, names)
    tried = [one for one, count in with_it.items() if count]
    sizes = (len(shows), len(others))
    kept = [
        (one, with_it[one], without[one]) for one in tried if _contrasts(with_it[one], without[one], *sizes)
    ]
    scale = (max(others_in_all, len(others)) / len(others)) / (max(shows_in_all, len(shows)) / len(shows))
    made = [_made(one, hits, false, sizes, scale, len(tried)) for one, hits, false in kept]
    sure = [(made_one, youden) for made_one, youden in made if made_one.p_value <= ERROR]
    best = max((youden for _, youden in sure), default=0.0)
    close = [one for one, youden in sure if youden >= best - CLOSE]
    return min(close, key=_complexity, default=None)


_Candidate = tuple[Kind, str, str]


def _count(requests: Sequence[Features], names: Iterable[str]) -> Counter[_Candidate]:
    """In how many requests each feature is."""
    found: Counter[_Candidate] = Counter()
    for request in requests:
        found.update(("present", name, "") for name in request)
        found.update(
            {("value", name, value) for name, values in request.items() for value in values if _short(value)}
        )
    for name in names:
        found["absent", name, ""] = len(requests) - found["present", name, ""]
    return found


def _short(value: str) -> bool:
    return len(value) <= LONGEST


def _contrasts(hits: int, false: int, shows: int, others: int) -> bool:
    coverage = hits / shows
    return coverage >= COVERAGE and false / others <= CONTRAST * coverage


def _made(
    one: _Candidate, hits: int, false: int, sizes: tuple[int, int], scale: float, tried: int
) -> tuple[Feature, float]:
    shows, others = sizes
    feature = Feature(
        kind=one[0],
        name=one[1],
        value=one[2],
        coverage=hits / shows,
        precision=hits / (hits + false * scale),
        p_value=min(1.0, fisher(hits, shows, false, others) * tried),
    )
    return feature, hits / shows - false / others


def _complexity(one: Feature) -> tuple[int, int, int, int, str, str]:
    place = _PLACES.get(one.name.partition(".")[0], len(_PLACES))
    return _KINDS[one.kind], place, one.name.count("."), len(one.name) + len(one.value), one.name, one.value


def fisher(hits: int, shows: int, false: int, others: int) -> float:
    """The probability, with the margins as they are, of at least `hits` of `shows` (Fisher 1935, "The design of experiments")."""
    marked = hits + false
    total = _log_choose(shows + others, marked)
    return min(
        1.0,
        sum(
            exp(_log_choose(shows, many) + _log_choose(others, marked - many) - total)
            for many in range(hits, min(shows, marked) + 1)
        ),
    )


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _put(found: dict[str, list[str]], name: str, value: str) -> None:
    values = found.setdefault(name, [])
    if value not in values:
        values.append(value)


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict | list):
        yield name, _text(value)
    elif not depth:
        return
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}", depth - 1)
    else:
        for inner in value:
            yield from _leaves(inner, f"{name}[*]", depth - 1)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
