"""Find the feature that the requests with a finding share and others lack, such as `query.currency=JPY`. Pure.

Each feature of a request (`name=value`, `name` present, `name` absent) divides two samples into a table of four counts.
A feature is a candidate if most requests with the finding have it, and far fewer without. It is kept if Fisher's exact
test (one-sided) rejects chance at FEATURE_ALPHA divided by the number of features that were tried (Bonferroni). Among
these the greatest Youden index wins: coverage minus the share among the others. Ties go to the simplest: a value before
a presence before an absence, the query before the path, headers and body, then the shorter name. Both samples have a
bounded size and are drawn separately, so precision is computed from the totals of each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, lgamma
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

import orjson

from abreast.export.redaction import HASH_PREFIX
from abreast.protocol.capture import Headers, Request

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
    values_by_name: dict[str, list[str]] = {}
    for source, pairs in (("query", query), ("path", (path or {}).items()), ("header", headers)):
        for name, value in pairs:
            _add_value(values_by_name, f"{source}.{name.lower() if source == 'header' else name}", value)
    if body is not None:
        for name, value in islice(_iterate_leaves(body, "body", MAX_BODY_DEPTH), MAX_BODY_LEAVES):
            _add_value(values_by_name, name, value)
    return values_by_name


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
    sizes = (len(with_finding), len(without_finding))
    scale = (max(total_without_finding, len(without_finding)) / len(without_finding)) / (
        max(total_with_finding, len(with_finding)) / len(with_finding)
    )
    scored = [
        _score_candidate(candidate, hit_counts[candidate], false_counts[candidate], sizes, scale, len(candidates))
        for candidate in candidates
        if _has_contrast(hit_counts[candidate], false_counts[candidate], *sizes)
    ]
    significant = [(feature, youden) for feature, youden in scored if feature.p_value <= FEATURE_ALPHA]
    best = max((youden for _, youden in significant), default=0.0)
    best_features = [candidate for candidate, youden in significant if youden >= best - YOUDEN_TOLERANCE]
    return min(best_features, key=_complexity, default=None)


def _count_candidates(requests: Sequence[RequestFeatures], names: Iterable[str]) -> Counter[_Candidate]:
    """Count the requests that have each feature."""
    counts: Counter[_Candidate] = Counter()
    for request in requests:
        counts.update(("present", name, "") for name in request)
        counts.update(
            {
                ("value", name, value)
                for name, values in request.items()
                for value in values
                if len(value) <= MAX_VALUE_CHARS
            }
        )
    for name in names:
        counts["absent", name, ""] = len(requests) - counts["present", name, ""]
    return counts


def _has_contrast(hits: int, false: int, with_finding: int, without_finding: int) -> bool:
    coverage = hits / with_finding
    return coverage >= MIN_COVERAGE and false / without_finding <= MAX_OTHERS_RATIO * coverage


def _score_candidate(
    candidate: _Candidate, hits: int, false: int, sizes: tuple[int, int], scale: float, candidate_count: int
) -> tuple[Feature, float]:
    with_finding, without_finding = sizes
    feature = Feature(
        kind=candidate[0],
        name=candidate[1],
        value=candidate[2],
        coverage=hits / with_finding,
        precision=hits / (hits + false * scale),
        p_value=min(1.0, fisher_exact(hits, with_finding, false, without_finding) * candidate_count),
    )
    return feature, hits / with_finding - false / without_finding


def _complexity(feature: Feature) -> tuple[int, int, int, int, str, str]:
    source = _SOURCE_ORDER.get(feature.name.partition(".")[0], len(_SOURCE_ORDER))
    return (
        _KIND_ORDER[feature.kind],
        source,
        feature.name.count("."),
        len(feature.name) + len(feature.value),
        feature.name,
        feature.value,
    )


def fisher_exact(hits: int, with_finding: int, false: int, without_finding: int) -> float:
    """Return the probability of at least `hits` with these margins (Fisher 1935, "The design of experiments")."""
    marked = hits + false
    total = _log_choose(with_finding + without_finding, marked)
    return min(
        1.0,
        sum(
            exp(_log_choose(with_finding, count) + _log_choose(without_finding, marked - count) - total)
            for count in range(hits, min(with_finding, marked) + 1)
        ),
    )


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _add_value(values_by_name: dict[str, list[str]], name: str, value: str) -> None:
    values = values_by_name.setdefault(name, [])
    if value not in values:
        values.append(value)


def _iterate_leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict | list):
        yield name, _format_value(value)
    elif not depth:
        return
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _iterate_leaves(inner, f"{name}.{key}", depth - 1)
    else:
        for inner in value:
            yield from _iterate_leaves(inner, f"{name}[*]", depth - 1)


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def collect_request_features(request: Request, route: str) -> dict[str, list[str]]:
    """Return the values that may be stored, by name: `query.currency`, `header.accept-language`, `body.items[*].sku`."""
    target = f"{request.path}?{request.query}" if request.query else request.path
    values_by_name = collect_target_features(target, route)
    values_by_name |= collect_features(
        headers=[header for header in request.headers if header[0] not in REQUEST_SPECIFIC_HEADERS],
        body=_parse_body(request),
    )
    for name in _iterate_cookie_names(request.headers):
        values_by_name.setdefault(f"cookie.{name}", [])
    names = sorted(values_by_name, key=lambda name: (name.startswith("body."), name))[:MAX_NAMES]
    return {name: _select_values(name, values_by_name[name]) for name in names if len(name) <= MAX_VALUE_CHARS}


def _select_values(name: str, values: list[str]) -> list[str]:
    if _SECRET_NAME.search(name):
        return []
    return [value for value in values if len(value) <= MAX_VALUE_CHARS and HASH_PREFIX not in value][
        :MAX_VALUES_PER_NAME
    ]


def _iterate_cookie_names(headers: Headers) -> Iterator[str]:
    for name, value in headers:
        if name == "cookie":
            yield from (part.partition("=")[0].strip() for part in value.split(";") if "=" in part)


def _parse_body(request: Request) -> object:
    """Parse a JSON or form body. Return None for all others."""
    body = request.body
    if not body.content or not body.is_complete or body.length > MAX_FEATURE_BODY_BYTES:
        return None
    if any(name == "content-type" and FORM_MEDIA_TYPE in value.lower() for name, value in request.headers):
        return _parse_form(body.content)
    try:
        document: object = orjson.loads(body.content)
    except orjson.JSONDecodeError:
        return None
    return document


def _parse_form(content: bytes) -> dict[str, str | list[str]] | None:
    try:
        pairs = parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=2 * MAX_NAMES)
    except ValueError:
        return None
    fields: dict[str, str | list[str]] = {}
    for name, value in pairs:
        previous = fields.get(name, [])
        values = [*([previous] if isinstance(previous, str) else previous), value]
        fields[name] = values if len(values) > 1 else value
    return fields
