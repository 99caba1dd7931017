"""The types of a comparison: paths, differences and results."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, NamedTuple

from msgspec import Raw, Struct

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.values import TYPE_NAMES, parse, render_value

Part = Literal["status", "header", "body", "error", "latency", "effect", "cache"]
Kind = Literal["added", "removed", "changed", "type", "format", "range", "order", "slower"]
Impact = Literal["breaking", "value", "additive"]
Outcome = Literal[
    "match", "mismatch", "partial", "only_old", "only_new", "baseline_only", "undecodable", "oversize", "shed",
    "aborted", "not_compared", "late",
]  # fmt: skip
COMPARED_OUTCOMES = frozenset({"match", "mismatch", "partial", "oversize"})  # the pair can show a finding

# Headers that depend on the machine, time, connection, request or build, not on the version's behaviour.
# A trailing * matches any suffix.
VOLATILE_HEADERS = frozenset(
    {
        "age", "alt-svc", "cf-*", "connection", "content-digest", "content-length", "content-md5", "date", "digest",
        "etag", "expires", "grpc-accept-encoding", "keep-alive", "last-modified", "nel", "report-to", "repr-digest", "server", "server-timing",
        "traceparent", "tracestate", "transfer-encoding", "via", "x-amz-cf-*", "x-amz-id-2",
        "x-amz-request-id", "x-amzn-requestid", "x-amzn-trace-id", "x-b3-*",
        "x-cloud-trace-context", "x-correlation-id", "x-datadog-*", "x-envoy-*", "x-powered-by", "x-process-time",
        "x-ratelimit-remaining", "x-ratelimit-reset", "x-ratelimit-used", "x-request-id",
        "x-response-time", "x-runtime", "x-served-by", "x-trace-id",
    }
)  # fmt: skip

# Matches keys and path segments that are ids as a whole.
ID_PATTERN = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?=[^\d]*\d)[0-9a-fA-F]{16,}"
    r"|(?=[^\d]*\d)[0-9A-Za-z_-]{24,}"
    r"|hmac:[0-9a-f:]{41}"  # a redacted segment
)
# These keys may be ids or timestamps. They count as such only if all keys of an object match.
_ID_LIKE_PATTERN = re.compile(
    r"\d{4}-\d\d(-\d\d)?([T ]\d\d:\d\d(:\d\d)?\S{0,16})?"
    r"|[A-Za-z]{1,16}[-:/#.]\d+"
    r"|[A-Za-z]{1,16}[-:/#][0-9A-Za-z]*\d[0-9A-Za-z]*"
    r"|[^@\s]{1,64}@[^@\s]{1,255}"
    r"|\d{1,3}(\.\d{1,3}){3}(:\d+)?"
)
# These keys may be fields too, such as `p99`, `sha256` or `line_2`.
_NUMBERED_PATTERN = re.compile(r"[A-Za-z]{1,16}(_[0-9A-Za-z]*)?\d[0-9A-Za-z]{0,16}")
_KEY_CACHE_SIZE = 4096
_TYPE_NAMES_BY_FIRST_BYTE = {
    b"{": "object", b"[": "array", b'"': "string", b"t": "boolean", b"f": "boolean", b"n": "null",
}  # fmt: skip
# Fewest entries of an object that make it a map, by the evidence for it.
MIN_ID_LIKE_KEYS, MIN_NUMBERED_KEYS, MIN_SAME_SHAPE_KEYS, MIN_SAME_TYPE_KEYS = 3, 8, 8, 50
MAX_KEYS = sys.maxsize
ELEMENT_SUFFIXES = ("[*]", ".*")  # paths of elements of arrays and maps: an added element is no new field
_PLAIN_KEY = re.compile(r"[A-Za-z_@#][\w-]*", re.ASCII)


class JsonPath(Struct):
    """A location in two documents: a step below its parent. The text of a path is built only when it is needed."""

    parent: JsonPath | None
    step: str | int
    old: Any
    new: Any
    new_index: int | None = None  # of an element of both arrays: `step` is its index in old
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

    def exact(self, *, is_added: bool = False) -> str:
        """Return the path with ids and indices, those of new for an added value, else of old: `$.items[3].price`."""
        steps = []
        node: JsonPath = self
        while node.parent is not None:
            step = node.new_index if is_added and node.new_index is not None else node.step
            steps.append(f"[{step}]" if isinstance(step, int) else _format_key(step))
            node = node.parent
        return str(node.step) + "".join(reversed(steps))

    def is_map(self) -> bool:
        """Tell whether the keys here are ids, so that differences below different keys have one cause."""
        if self._is_map is None:
            self._is_map = is_map(self.old, self.new)
        return self._is_map


def is_map(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether an object maps ids to values: by its keys, or by many values of one shape or one type."""
    has_key_count = len(old) >= MIN_SAME_TYPE_KEYS or old.keys() == new.keys()
    key_count = len(old) if has_key_count else len(old.keys() | new.keys())
    if key_count < MIN_ID_LIKE_KEYS:
        return False
    if MAX_KEYS not in map(_least_key_count, old) and MAX_KEYS not in map(_least_key_count, new.keys() - old.keys()):
        return key_count >= MIN_NUMBERED_KEYS or key_count >= max(map(_least_key_count, chain(old, new)))
    if key_count < MIN_SAME_SHAPE_KEYS:
        return False
    type_names = _find_type_names(old, new)
    if type_names == {"object"}:
        values = [*old.values(), *new.values()]
        if type(values[0]) is Raw:
            values = parse(b"[%b]" % b",".join(values))  # one call is faster than one for each
        shapes = Counter(frozenset(value) for value in values if value is not None)
        shape, count = shapes.most_common(1)[0]
        return len(shape) > 1 and count * 5 >= len(values) * 4
    return key_count >= MIN_SAME_TYPE_KEYS and len(type_names) == 1


def _find_type_names(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Return the JSON types of the values without null, or two of them if there are several."""
    names: set[str] = set()
    for values in (old.values(), new.values()):
        kinds = {*map(type, values)}
        if Raw not in kinds:
            names |= {TYPE_NAMES.get(kind, "number") for kind in kinds} - {"null"}
        for value in values if Raw in kinds else ():
            names |= {_TYPE_NAMES_BY_FIRST_BYTE.get(bytes(value)[:1], "number")} - {"null"}
            if len(names) > 1:
                break
        if len(names) > 1:
            break
    return names


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _least_key_count(key: str) -> int:
    """Return how many such keys make an object a map, whatever its values are."""
    if ID_PATTERN.fullmatch(key) or _ID_LIKE_PATTERN.fullmatch(key):
        return MIN_ID_LIKE_KEYS
    return MIN_NUMBERED_KEYS if _NUMBERED_PATTERN.fullmatch(key) else MAX_KEYS


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _generalise_key(key: str) -> str:
    return ".*" if ID_PATTERN.fullmatch(key) else _format_key(key)


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _format_key(key: str) -> str:
    return f".{key}" if _PLAIN_KEY.fullmatch(key) else f"[{json.dumps(key)}]"


class RenderedValues(NamedTuple):
    exact_path: str
    old: str | None
    new: str | None


class Difference(Struct, frozen=True, eq=False):
    """A place where two responses differ. `added` and `removed` are relative to the old response."""

    part: Part
    path: str  # generalised: `$.items[*].price`, the name of a header, `200->500`; empty for the whole part
    kind: Kind
    impact: Impact
    location: JsonPath | RenderedValues  # most differences are only counted: a JsonPath renders its texts on demand
    explained_by: str = ""  # name of the rule that explains it
    hint: str = ""  # a rule that would explain it: `keyed-by id`, `unordered`

    @staticmethod
    def from_values(part: Part, path: str, old: Any, new: Any, impact: Impact, exact_path: str = "") -> Difference:
        """Build a difference whose kind is `added` or `removed` if a value is None, else `changed`."""
        kind: Kind = "added" if old is None else "removed" if new is None else "changed"
        texts = [None if value is None else render_value(value) for value in (old, new)]
        return Difference(part, path, kind, impact, RenderedValues(exact_path, *texts))

    @property
    def place(self) -> tuple[str, str, str]:
        """Part, path and kind, which identify a finding of an endpoint."""
        return self.part, self.path, self.kind

    @property
    def exact_path(self) -> str:
        """The path with ids and indices, those of new for an added value, else of old: `$.items[3].price`."""
        if isinstance(self.location, JsonPath):
            return self.location.exact(is_added=self.kind == "added")
        return self.location.exact_path

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
        location = RenderedValues(self.exact_path, self.old, self.new)
        return Difference, (self.part, self.path, self.kind, self.impact, location, self.explained_by, self.hint)


_RECORD_FIELDS = ("part", "path", "exact_path", "kind", "impact", "old", "new", "explained_by", "hint")


class ComparisonResult(Struct, frozen=True):
    """The outcome of one sampled request, with its captures and differences."""

    outcome: Outcome
    method: str
    route: str  # a template such as `/products/{id}`
    old: Capture | None = None
    new: Capture | None = None
    baseline: Capture | None = None  # a second response of one version, usually of the one that answered the user
    failed_over: bool = False  # new failed first, then old answered the user
    differences: tuple[Difference, ...] = ()  # old and new, not explained by a rule
    explained_differences: tuple[Difference, ...] = ()  # old and new, explained by a rule
    noise: tuple[Difference, ...] = ()  # baseline and the other response of its version, not explained by a rule
    explained_noise: tuple[Difference, ...] = ()  # the same, explained by a rule
    baseline_compared: bool = False
    reason: str = ""
    route_source: str = ""  # see `endpoints`

    @property
    def all_differences(self) -> tuple[Difference, ...]:
        return self.differences + self.explained_differences + self.noise + self.explained_noise
