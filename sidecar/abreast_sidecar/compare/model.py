"""The types of a comparison: paths, differences and results."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, NamedTuple

from msgspec import Raw, Struct

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.values import parse_raw, render_value

Part = Literal["status", "header", "body", "error", "latency", "effect", "cache"]
Kind = Literal["added", "removed", "changed", "type", "format", "range", "order", "slower"]
Impact = Literal["breaking", "value", "additive"]
Outcome = Literal[
    "match", "mismatch", "partial", "only_old", "only_new", "baseline_only", "undecodable", "oversize", "shed",
    "aborted", "not_compared",
]  # fmt: skip

# Headers that depend on the machine, time, connection, request or build, not on the version's behaviour.
# A trailing * matches any suffix.
VOLATILE_HEADERS = frozenset(
    {
        "age", "alt-svc", "cf-*", "connection", "content-digest", "content-length", "content-md5", "date", "digest",
        "etag", "expires", "keep-alive", "last-modified", "nel", "report-to", "repr-digest", "server", "server-timing",
        "traceparent", "tracestate", "transfer-encoding", "via", "x-amz-*", "x-amzn-*", "x-b3-*",
        "x-cloud-trace-context", "x-correlation-id", "x-datadog-*", "x-envoy-*", "x-powered-by", "x-process-time",
        "x-ratelimit-*", "x-request-id", "x-response-time", "x-runtime", "x-served-by", "x-trace-id",
    }
)  # fmt: skip

# Matches keys and path segments that are ids as a whole.
_ID_PATTERN = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?=[^\d]*\d)[0-9a-fA-F]{16,}"
    r"|(?=[^\d]*\d)[0-9A-Za-z_-]{24,}"
)
# These keys may be ids or timestamps. They count as such only if all keys of an object match.
_ID_LIKE_PATTERN = re.compile(
    r"\d{4}-\d\d(-\d\d)?([T ]\d\d:\d\d(:\d\d)?\S{0,16})?"
    r"|[A-Za-z]{1,16}[-_:/#.]?\d+"
    r"|[A-Za-z]{1,16}[-_:/#][0-9A-Za-z]*\d[0-9A-Za-z]*"
    r"|[^@\s]{1,64}@[^@\s]{1,255}"
    r"|\d{1,3}(\.\d{1,3}){3}(:\d+)?"
)
_KEY_CACHE_SIZE = 4096
_TYPES_BY_FIRST_BYTE = {b"{": dict, b"[": list, b'"': str, b"t": bool, b"f": bool, b"n": type(None)}
# Fewest entries of an object that make it a map, by the evidence for it.
MIN_ID_LIKE_KEYS, MIN_SAME_SHAPE_KEYS, MIN_SAME_TYPE_KEYS = 3, 8, 50
_PLAIN_KEY = re.compile(r"[A-Za-z_@#][\w-]*", re.ASCII)
_ROUTE_CONVERTOR = re.compile(r"\{(\w+):\w+\}")


class JsonPath(Struct):
    """A location in two documents: a step below its parent. The text of a path is built only when it is needed."""

    parent: JsonPath | None
    step: str | int
    old: Any
    new: Any
    _generalised: str | None = None
    _is_map: bool | None = None

    def generalised(self) -> str:
        """Return the path without indices and ids, such as `$.items[*].price`: differences with one cause share it."""
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
        """Return the path with indices and ids, such as `$.items[3].price`."""
        steps = []
        node: JsonPath = self
        while node.parent is not None:
            steps.append(f"[{node.step}]" if isinstance(node.step, int) else _format_key(node.step))
            node = node.parent
        return str(node.step) + "".join(reversed(steps))

    def is_map(self) -> bool:
        """Tell whether the keys here are ids, so that differences below different keys have one cause."""
        if self._is_map is None:
            self._is_map = is_map(self.old, self.new)
        return self._is_map


def is_map(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether an object maps ids to values: by its keys, or by many values of one shape or one type."""
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
    """Return the route: the template without convertors, or the path with `{id}` for ids if there is no template."""
    if template:
        return _ROUTE_CONVERTOR.sub(r"{\1}", template)
    return "/".join("{id}" if _ID_PATTERN.fullmatch(segment) else segment for segment in path.split("/")) or "/"


class RenderedValues(NamedTuple):
    exact_path: str
    old: str | None
    new: str | None


class Difference(Struct, frozen=True, eq=False):
    """A place where two answers differ. `added` and `removed` are relative to the old answer."""

    part: Part
    path: str  # generalised: `$.items[*].price`, the name of a header, `200->500`; empty for the whole part
    kind: Kind
    impact: Impact
    location: JsonPath | RenderedValues  # most differences are only counted: a JsonPath renders its texts on demand
    explained_by: str = ""  # name of the rule that explains it
    hint: str = ""  # a rule that would explain it: `keyed-by id`, `unordered`

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
        """Build a difference from rendered values."""
        return Difference(part, path, kind, impact, RenderedValues(exact_path, old, new), explained_by, hint)

    @staticmethod
    def from_values(part: Part, path: str, old: Any, new: Any, impact: Impact, exact_path: str = "") -> Difference:
        """Build a difference whose kind is `added` or `removed` if a value is None, else `changed`."""
        kind: Kind = "added" if old is None else "removed" if new is None else "changed"
        texts = [None if value is None else render_value(value) for value in (old, new)]
        return Difference(part, path, kind, impact, RenderedValues(exact_path, *texts))

    @property
    def exact_path(self) -> str:
        """The path with indices and ids, such as `$.items[3].price`."""
        return self.location.exact() if isinstance(self.location, JsonPath) else self.location.exact_path

    @property
    def old(self) -> str | None:
        """The old value as JSON text of at most MAX_VALUE_CHARS characters. None if new added it."""
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
    """The outcome of one sampled request, with its captures and differences."""

    outcome: Outcome
    method: str
    route: str  # a template such as `/products/{id}`
    old: Capture | None = None
    new: Capture | None = None
    baseline: Capture | None = None  # a second answer of the old version
    differences: tuple[Difference, ...] = ()  # old and new, not explained by a rule
    explained_differences: tuple[Difference, ...] = ()  # old and new, explained by a rule
    noise: tuple[Difference, ...] = ()  # old and baseline, not explained by a rule
    explained_noise: tuple[Difference, ...] = ()  # old and baseline, explained by a rule
    baseline_compared: bool = False
    reason: str = ""

    @property
    def all_differences(self) -> tuple[Difference, ...]:
        return self.differences + self.explained_differences + self.noise + self.explained_noise
