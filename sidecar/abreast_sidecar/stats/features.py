"""Find the feature that the requests with a finding share and others lack, such as `query.currency=JPY`. Pure.

Each feature of a request (`name=value`, `name` present, `name` absent) divides two samples into a table of four counts.
A feature is a candidate if most requests with the finding have it, and far fewer without. It is kept if Fisher's exact
test (one-sided) rejects chance at FEATURE_ALPHA divided by the number of features that were tried (Bonferroni). Among
these the greatest Youden index wins: coverage minus the share among the others. Ties go to the simplest: a value before
a presence before an absence, the query before the path, headers and body, then the shorter name. Both samples have a
bounded size and are drawn separately, so precision is computed from the totals of each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, lgamma
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

import orjson

from abreast.protocol.capture import HASH_PREFIX, Request
from abreast_sidecar.compare.documents import parse_form

FEATURE_ALPHA = 0.01  # probability of naming any feature by chance
MIN_REQUESTS = 5  # with the finding, and without it
MIN_COVERAGE = 0.7
MAX_OTHERS_RATIO = 0.5  # share among the others, as a part of the coverage
YOUDEN_TOLERANCE = 0.02  # closer Youden indices are a tie
MAX_VALUE_CHARS = 80  # longer values are no features
MAX_BODY_LEAVES = 200
MAX_BODY_DEPTH = 8
MAX_NAMES = 100  # per request
MAX_VALUES_PER_NAME = 5
MAX_FEATURE_BODY_BYTES = 16 * 1024  # a longer body has no features
FORM_MEDIA_TYPE = "application/x-www-form-urlencoded"
# These identify one request or connection.
REQUEST_SPECIFIC_HEADERS = frozenset(
    {"content-length", "cookie", "date", "forwarded", "idempotency-key", "traceparent", "tracestate", "via",
     "x-abreast-pair", "x-forwarded-for", "x-real-ip", "x-request-id"}
)  # fmt: skip

RequestFeatures = Mapping[str, Sequence[str]]  # name → values
FeatureKind = Literal["value", "present", "absent"]
_Candidate = tuple[FeatureKind, str, str]

_SECRET_NAME = re.compile(
    r"pass(w|phrase|code|$)|pwd|secret|token|api.?key|auth(?!or)|session|credential|signature"
    r"|(?<![a-z])(pin|otp|cvv|cvc|iban|ssn)(?![a-z])|(?<![a-z])card",
    re.IGNORECASE,
)

_KIND_ORDER: dict[FeatureKind, int] = {"value": 0, "present": 1, "absent": 2}
_SOURCE_ORDER = {"query": 0, "path": 1, "header": 2, "cookie": 3, "body": 4}


@dataclass(frozen=True, slots=True)
class Feature:
    kind: FeatureKind
    name: str  # query.currency, path.id, header.accept-language, body.items[*].sku
    value: str  # empty unless the kind is `value`
    coverage: float  # share of the requests with the finding that have the feature
    precision: float  # share of the requests with the feature that have the finding
    p_value: float  # corrected for the number of tested features

    def __str__(self) -> str:
        if self.kind == "value":
            return f"{self.name}={self.value}"
        return self.name if self.kind == "present" else f"no {self.name}"


def collect_features(
    query: Iterable[tuple[str, str]] = (),
    path: Mapping[str, str] | None = None,
    headers: Iterable[tuple[str, str]] = (),
    body: Any = None,
) -> dict[str, list[str]]:
    """Return the features of query and path parameters, headers, and a parsed JSON or form body."""
    pairs = [(f"query.{name}", value) for name, value in query]
    pairs += [(f"path.{name}", value) for name, value in (path or {}).items()]
    pairs += [(f"header.{name.lower()}", value) for name, value in headers]
    if body is not None:
        pairs += islice(_iterate_leaves(body, "body", MAX_BODY_DEPTH), MAX_BODY_LEAVES)
    values_by_name: dict[str, dict[str, None]] = {}
    for name, value in pairs:
        values_by_name.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in values_by_name.items()}


def collect_target_features(target: str, route: str) -> dict[str, list[str]]:
    """Return the features of a target such as `/prices/7?currency=JPY`, with the route `/prices/{id}`."""
    path, _, query = target.partition("?")
    steps, names = path.split("/"), route.split("/")
    parameters = {
        name[1:-1].partition(":")[0]: unquote(step)
        for name, step in zip(names, steps, strict=False)
        if name.startswith("{") and name.endswith("}") and len(steps) == len(names)
    }
    return collect_features(parse_qsl(query, keep_blank_values=True, max_num_fields=None), parameters)


def find_common_feature(
    with_finding: Sequence[RequestFeatures],
    without_finding: Sequence[RequestFeatures],
    *,
    total_with_finding: int = 0,
    total_without_finding: int = 0,
) -> Feature | None:
    """Return the feature that best separates the requests with a finding from those without, None for no such feature.

    A few hundred requests of each are enough. `total_with_finding` and `total_without_finding` are the sizes of the
    populations, by default those of the samples.
    """
    if len(with_finding) < MIN_REQUESTS or len(without_finding) < MIN_REQUESTS:
        return None
    names = {name for request in (*with_finding, *without_finding) for name in request}
    hit_counts, false_counts = _count_candidates(with_finding, names), _count_candidates(without_finding, names)
    candidates = [candidate for candidate, count in hit_counts.items() if count]
    scale = (max(total_without_finding, len(without_finding)) / len(without_finding)) / (
        max(total_with_finding, len(with_finding)) / len(with_finding)
    )
    significant: list[tuple[float, Feature]] = []
    for candidate in candidates:
        hits, false = hit_counts[candidate], false_counts[candidate]
        coverage, false_share = hits / len(with_finding), false / len(without_finding)
        if coverage < MIN_COVERAGE or false_share > MAX_OTHERS_RATIO * coverage:
            continue
        p_value = min(1.0, fisher_exact(hits, len(with_finding), false, len(without_finding)) * len(candidates))
        if p_value <= FEATURE_ALPHA:
            feature = Feature(*candidate, coverage, precision=hits / (hits + false * scale), p_value=p_value)
            significant.append((coverage - false_share, feature))
    best = max((youden for youden, _ in significant), default=0.0)
    best_features = [feature for youden, feature in significant if youden >= best - YOUDEN_TOLERANCE]
    return min(best_features, key=_complexity, default=None)


def _count_candidates(requests: Sequence[RequestFeatures], names: Iterable[str]) -> Counter[_Candidate]:
    """Count the requests that have each feature."""
    counts: Counter[_Candidate] = Counter()
    for request in requests:
        counts.update(("present", name, "") for name in request)
        pairs = {(name, value) for name, values in request.items() for value in values}
        counts.update(("value", name, value) for name, value in pairs if len(value) <= MAX_VALUE_CHARS)
    for name in names:
        counts["absent", name, ""] = len(requests) - counts["present", name, ""]
    return counts


def _complexity(feature: Feature) -> tuple[int, int, int, int, str, str]:
    name, value = feature.name, feature.value
    source = _SOURCE_ORDER.get(name.partition(".")[0], len(_SOURCE_ORDER))
    return _KIND_ORDER[feature.kind], source, name.count("."), len(name) + len(value), name, value


def fisher_exact(hits: int, with_finding: int, false: int, without_finding: int) -> float:
    """Return the probability of at least `hits` with these margins (Fisher 1935, "The design of experiments")."""
    marked = hits + false
    total = _log_choose(with_finding + without_finding, marked)
    probabilities = (
        exp(_log_choose(with_finding, count) + _log_choose(without_finding, marked - count) - total)
        for count in range(hits, min(with_finding, marked) + 1)
    )
    return min(1.0, sum(probabilities))


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _iterate_leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict | list):
        yield name, json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    elif not depth:
        return
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _iterate_leaves(inner, f"{name}.{key}", depth - 1)
    else:
        for inner in value:
            yield from _iterate_leaves(inner, f"{name}[*]", depth - 1)


def collect_request_features(request: Request, route: str) -> dict[str, list[str]]:
    """Return the values that may be stored, by name: `query.currency`, `header.accept-language`, `body.items[*].sku`."""
    values_by_name = collect_target_features(request.target, route)
    values_by_name |= collect_features(
        headers=[header for header in request.headers if header[0] not in REQUEST_SPECIFIC_HEADERS],
        body=_parse_body(request),
    )
    values_by_name |= {f"header.{name}": [] for name in request.other_headers if name not in REQUEST_SPECIFIC_HEADERS}
    cookies = (part for name, value in request.headers if name == "cookie" for part in value.split(";"))
    values_by_name |= {f"cookie.{cookie.partition('=')[0].strip()}": [] for cookie in cookies if "=" in cookie}
    names = sorted(values_by_name, key=lambda name: (name.startswith("body."), name))[:MAX_NAMES]
    return {name: _select_values(name, values_by_name[name]) for name in names if len(name) <= MAX_VALUE_CHARS}


def _select_values(name: str, values: list[str]) -> list[str]:
    if _SECRET_NAME.search(name):
        return []
    storable_values = [value for value in values if len(value) <= MAX_VALUE_CHARS and HASH_PREFIX not in value]
    return storable_values[:MAX_VALUES_PER_NAME]


def _parse_body(request: Request) -> object:
    """Parse a JSON or form body. Return None for all others."""
    body = request.body
    if not body.content or not body.is_complete or body.length > MAX_FEATURE_BODY_BYTES:
        return None
    is_form = any(name == "content-type" and FORM_MEDIA_TYPE in value.lower() for name, value in request.headers)
    try:
        return parse_form(body.content.decode(), 2 * MAX_NAMES) if is_form else orjson.loads(body.content)
    except ValueError:
        return None
