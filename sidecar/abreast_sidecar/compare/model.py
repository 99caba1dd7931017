"""The nouns of a comparison."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from msgspec import Raw, Struct

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.values import parse_raw, render_value

if TYPE_CHECKING:
    pass


# The end of a longer word is no id; a key or segment that is one as a whole is.
_ID_PATTERN = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?=[^\d]*\d)[0-9a-fA-F]{16,}"
    r"|(?=[^\d]*\d)[0-9A-Za-z_-]{24,}"
)
# These are ids, or moments, only where all keys of an object look so.
_ID_LIKE_PATTERN = re.compile(
    r"\d{4}-\d\d(-\d\d)?([T ]\d\d:\d\d(:\d\d)?\S{0,16})?"
    r"|[A-Za-z]{1,16}[-_:/#.]?\d+"
    r"|[A-Za-z]{1,16}[-_:/#][0-9A-Za-z]*\d[0-9A-Za-z]*"
    r"|[^@\s]{1,64}@[^@\s]{1,255}"
    r"|\d{1,3}(\.\d{1,3}){3}(:\d+)?"
)
_KEY_CACHE_SIZE = 4096  # of documents, that are remembered as they are written
_TYPES_BY_FIRST_BYTE = {
    b"{": dict,
    b"[": list,
    b'"': str,
    b"t": bool,
    b"f": bool,
    b"n": type(None),
}  # by how a text begins
MIN_ID_LIKE_KEYS, MIN_SAME_SHAPE_KEYS, MIN_SAME_TYPE_KEYS = 3, 8, 50  # entries that make a map

_PLAIN_KEY = re.compile(r"[A-Za-z_@#][\w-]*", re.ASCII)
_ROUTE_CONVERTOR = re.compile(r"\{(\w+):\w+\}")


class JsonPath(Struct):
    """Where a walk through two documents is: a step below another place. Paths are only written when asked for."""

    parent: JsonPath | None
    step: str | int
    old: Any
    new: Any
    _generalised: str | None = None
    _is_map: bool | None = None

    def generalised(self) -> str:
        """`$.items[*].price`: one cause, one path, whatever the index or id."""
        path = self._generalised
        if path is None:
            parent, step = self.parent, self.step
            if parent is None:
                path = str(step)
            elif type(step) is int:
                path = parent.generalised() + "[*]"
            else:
                path = parent.generalised() + (".*" if parent.is_map() else _generalise_key(step))
            self._generalised = path
        return path

    def exact(self) -> str:
        """`$.items[3].price`"""
        steps = []
        node: JsonPath = self
        while node.parent is not None:
            steps.append(f"[{node.step}]" if isinstance(node.step, int) else _format_key(node.step))
            node = node.parent
        return str(node.step) + "".join(reversed(steps))

    def is_map(self) -> bool:
        """Whether the keys here are ids, so that what differs below them is one cause."""
        if self._is_map is None:
            self._is_map = is_map(self.old, self.new)
        return self._is_map


def is_map(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Ids as keys; many values of one shape; or very many plain values of one type."""
    for key in chain(old, new):
        if not _is_id_like(key):
            break
    else:
        return len(old.keys() | new.keys()) >= MIN_ID_LIKE_KEYS
    key_count = len(old) if old.keys() == new.keys() else len(old.keys() | new.keys())
    if key_count < MIN_SAME_SHAPE_KEYS:
        return False
    values = list(chain(old.values(), new.values()))
    kinds = {*map(_get_value_type, values)} - {type(None)}
    if kinds == {dict}:
        shapes = Counter(frozenset(value) for value in map(parse_raw, values) if value is not None)
        shape, count = shapes.most_common(1)[0]
        return len(shape) > 1 and count * 5 >= len(values) * 4
    return key_count >= MIN_SAME_TYPE_KEYS and (len(kinds) == 1 or kinds == {int, float})


def _get_value_type(value: Any) -> type:
    """Also of what was not parsed."""
    if type(value) is not Raw:
        return type(value)
    return _TYPES_BY_FIRST_BYTE.get(bytes(value)[:1]) or type(parse_raw(value))


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _is_id_like(key: str) -> bool:
    return bool(_ID_PATTERN.fullmatch(key) or _ID_LIKE_PATTERN.fullmatch(key))


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _generalise_key(key: str) -> str:
    return ".*" if _ID_PATTERN.fullmatch(key) else _format_key(key)


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _format_key(key: str) -> str:
    return f".{key}" if _PLAIN_KEY.fullmatch(key) else f"[{json.dumps(key)}]"


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def normalise_route(template: str, path: str) -> str:
    """The endpoint's route: the template without convertors, or else the path with its ids generalised."""
    if template:
        return _ROUTE_CONVERTOR.sub(r"{\1}", template)
    return "/".join("{id}" if _ID_PATTERN.fullmatch(segment) else segment for segment in path.split("/")) or "/"


Part = Literal["status", "header", "body", "error", "latency", "effect", "cache"]
Kind = Literal["added", "removed", "changed", "type", "format", "range", "order", "slower"]
Impact = Literal["breaking", "value", "additive"]
Outcome = Literal[
    "match",
    "mismatch",
    "partial",
    "only_old",
    "only_new",
    "baseline_only",
    "undecodable",
    "oversize",
    "shed",
    "aborted",
    "not_compared",
]

# Headers that say nothing about a version: they name a machine, a moment, a connection or one request, or belong to
# one build (validators). Names that end in * stand for all that begin so.
VOLATILE_HEADERS = frozenset(
    {
        "age",
        "alt-svc",
        "cf-*",
        "connection",
        "content-digest",
        "content-length",  # said again, and better, by the body; so do the digests
        "content-md5",
        "date",
        "digest",
        "etag",
        "expires",  # a moment; cache-control is compared
        "keep-alive",
        "last-modified",
        "nel",
        "report-to",
        "repr-digest",
        "server",
        "server-timing",
        "traceparent",
        "tracestate",
        "transfer-encoding",
        "via",
        "x-amz-*",
        "x-amzn-*",
        "x-b3-*",
        "x-cloud-trace-context",
        "x-correlation-id",
        "x-datadog-*",
        "x-envoy-*",
        "x-powered-by",
        "x-process-time",
        "x-ratelimit-*",
        "x-request-id",
        "x-response-time",
        "x-runtime",
        "x-served-by",
        "x-trace-id",
    }
)


class RenderedValues(NamedTuple):
    exact_path: str
    old: str | None
    new: str | None


class Difference(Struct, frozen=True, eq=False):
    """One place where two answers differ, seen from the old one."""

    part: Part
    path: str  # generalised: `$.items[*].price`, a header's name, `200->500`; empty for the whole part
    kind: Kind
    impact: Impact
    location: (
        JsonPath | RenderedValues
    )  # texts of a Place are written when someone reads them: most only count for what is known already
    explained_by: str = ""  # the rule that covers it
    hint: str = ""  # a rule that would: `keyed-by id`, `unordered`

    @staticmethod
    def from_text(
        part: Part,
        path: str,
        exact_path: str,
        kind: Kind,
        impact: Impact,
        old: str | None,
        new: str | None,
        explained_by: str = "",
        hint: str = "",
    ) -> Difference:
        """One whose texts are known."""
        return Difference(part, path, kind, impact, RenderedValues(exact_path, old, new), explained_by, hint)

    @property
    def exact_path(self) -> str:
        """Exact: `$.items[3].price`"""
        return self.location.exact() if isinstance(self.location, JsonPath) else self.location.exact_path

    @property
    def old(self) -> str | None:
        """JSON text of at most VALUE_LIMIT characters; None where there is none."""
        if isinstance(self.location, JsonPath):
            return None if self.kind == "added" else render_value(self.location.old)
        return self.location.old

    @property
    def new(self) -> str | None:
        if isinstance(self.location, JsonPath):
            return None if self.kind == "removed" else render_value(self.location.new)
        return self.location.new

    def to_record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RECORD_FIELDS}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Difference) and self.to_record() == other.to_record()

    def __hash__(self) -> int:
        return hash(tuple(self.to_record().values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Difference.from_text, tuple(self.to_record().values())


_RECORD_FIELDS = ("part", "path", "exact_path", "kind", "impact", "old", "new", "explained_by", "hint")


class ComparisonResult(Struct, frozen=True):
    """What became of one sampled request."""

    outcome: Outcome
    method: str
    route: str  # template, or the path with its ids generalised
    old: Capture | None = None
    new: Capture | None = None
    baseline: Capture | None = None  # a second answer of old
    differences: tuple[Difference, ...] = ()  # old against new, that no rule explains
    explained_differences: tuple[Difference, ...] = ()  # old against new, each with the rule that explains it
    noise: tuple[Difference, ...] = ()  # old against old, that no rule explains
    explained_noise: tuple[Difference, ...] = ()  # old against old, each with the rule that explains it
    baseline_compared: bool = False
    reason: str = ""

    @property
    def all_differences(self) -> tuple[Difference, ...]:
        """All that was found, explained or not."""
        return self.differences + self.explained_differences + self.noise + self.explained_noise
