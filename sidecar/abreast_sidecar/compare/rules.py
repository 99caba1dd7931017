"""Rules: declarations of known differences that are ignored, tolerated or expected."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Any, Literal

import orjson
from msgspec import UNSET, Meta
from msgspec.structs import replace

from abreast_sidecar.compare.model import VOLATILE_HEADERS, Difference, Kind, Part

Action = Literal["ignore", "tolerate", "unordered", "keyed-by", "expect", "waive-coverage"]
ACTIONS: tuple[Action, ...] = ("ignore", "tolerate", "unordered", "keyed-by", "expect", "waive-coverage")
MAX_FIELD_CHARS = 500
MAX_RECURSIVE_WILDCARDS = 4  # `**` of a pattern
TOLERABLE_KINDS = frozenset({"changed", "format", "range"})  # with a value on both sides
MAX_CACHED_SCOPES = 4096
_STEP_PATTERN = r"(?:\.\*|\.\$|\.[A-Za-z_@#][\w-]*|\[\*\]|\[\"(?:[^\"\\]|\\.)*\"\])"
_PATTERN_TOKENS = re.compile(
    r"(?P<any>\.\*\*|\*\*)|(?P<key>\.\*)|(?P<index>\[\*?\])|(?P<exact>\[\d+\])|(?P<part>[^*\[.]+|.)", re.DOTALL
)

ACTION_DESCRIPTION = """\
ignore: the difference means nothing. \
tolerate: numbers and timestamps may differ a little. \
unordered: the order of an array means nothing. \
keyed-by: a field identifies the elements of an array. \
expect: the change is intended. \
waive-coverage: a verdict can be PASS although the endpoint can't be compared."""
PATH_DESCRIPTION = """\
A path such as `$.items[*].price`, and everything below it. \
`[*]` is any element, `.*` any key, `.**` any number of steps."""

# Types of fields. `expected` completes the message `<field> must be`; `schema` overrides the JSON schema of the type.
Text = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_FIELD_CHARS,
        extra={"expected": f"text of 1 to {MAX_FIELD_CHARS} characters", "schema": {"type": ["string", "number"]}},
    ),
]
PathPattern = Annotated[
    Text,
    Meta(
        extra={
            "expected": f"a pattern of 1 to {MAX_FIELD_CHARS} characters, with `**` at most {MAX_RECURSIVE_WILDCARDS} times"
        }
    ),
]
StatusPattern = Annotated[
    str,
    Meta(
        pattern=r"^ *([1-5xX][0-9xX]{2}|\*) *(-> *([1-5xX][0-9xX]{2}|\*) *)?$",
        extra={"expected": "a status such as 404, 4xx or 404->200", "schema": {"type": ["string", "integer"]}},
    ),
]
Amount = Annotated[float, Meta(ge=0, extra={"expected": "a number that is not negative"})]
Share = Annotated[
    float,
    Meta(
        ge=0,
        extra={
            "expected": "a share such as 0.01 or 1%",
            "schema": {"type": ["number", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?\s*%$"},
        },
    ),
]
Day = Annotated[dt.date, Meta(extra={"expected": "a day such as 2030-01-31"})]
JsonValue = Annotated[
    Any,
    Meta(
        extra={
            "expected": "a JSON value; quote a text that looks like a date",
            "schema": {"type": ["string", "number", "boolean", "null"]},
        }
    ),
]


@dataclass(frozen=True, slots=True)
class RuleScope:
    """The origin of a pair of answers, to which a rule may be limited."""

    service: str = ""
    endpoint: str = ""  # `GET /products/{id}`
    old_release: str = ""
    new_release: str = ""
    statuses: tuple[int, int] = (0, 0)  # old, new


@dataclass(frozen=True, slots=True)
class Rule:
    """A declared difference. Each field that is set narrows the rule.

    The types and descriptions are those of documents too, see `rule_document`.
    """

    name: Annotated[Text, Meta(description="Names the rule in outputs. Unique within a document.")]
    action: Annotated[Action, Meta(description=ACTION_DESCRIPTION)]
    part: Annotated[Part | None, Meta(description="The part of an answer that differs.")] = None
    path: Annotated[PathPattern, Meta(description=PATH_DESCRIPTION)] = ""
    kind: Annotated[Kind | None, Meta(description="The kind of difference.")] = None
    service: Annotated[Text, Meta(description="The service. Wildcards as in a shell: `*`, `?`, `[...]`.")] = ""
    endpoint: Annotated[
        Text, Meta(description="An endpoint such as `GET /products/{id}`. Wildcards as in a shell.")
    ] = ""
    status: Annotated[
        StatusPattern,
        Meta(description="The status of both answers, `404` or `4xx`, or its change, `404->200` or `5xx->*`."),
    ] = ""
    release: Annotated[Text, Meta(description="The release of the new version. Wildcards as in a shell.")] = ""
    by: Annotated[Text, Meta(description="keyed-by: the field that identifies an element of the array.")] = ""
    absolute: Annotated[
        Amount | None, Meta(description="tolerate: the largest distance, in seconds for timestamps.")
    ] = None
    relative: Annotated[
        Share | None, Meta(description="tolerate: the largest distance, as a share of the old number.")
    ] = None
    old: Annotated[JsonValue, Meta(description="expect: the old value.")] = UNSET
    new: Annotated[JsonValue, Meta(description="expect: the new value.")] = UNSET
    reason: Annotated[Text, Meta(description="Why the difference is known.")] = ""
    owner: Annotated[Text, Meta(description="Who answers for the rule.")] = ""
    expires: Annotated[Day | None, Meta(description="The first day on which the rule no longer applies.")] = None

    def applies(self, scope: RuleScope) -> bool:
        return (
            self.applies_to(scope.service, scope.endpoint)
            and self.applies_to_release(scope.new_release)
            and matches_statuses(self.status, scope.statuses)
        )

    def applies_to(self, service: str, endpoint: str) -> bool:
        return _matches(self.service, service) and _matches(self.endpoint, endpoint)

    def applies_to_release(self, release: str) -> bool:
        return _matches(self.release, release)

    @property
    def is_value_independent(self) -> bool:
        """True if the rule needs no values, so that it applies to stored pairs whose values are not kept."""
        return self.action == "ignore" or (self.action == "expect" and self.old is self.new is UNSET)

    @property
    def affects_differences(self) -> bool:
        """False for a waiver, which only affects the verdict."""
        return self.action != "waive-coverage"

    def may_match(self, part: str, path: str, kind: str) -> bool:
        """Tell whether the rule can explain or, for keyed-by, avoid such a difference, whatever its values are."""
        if not self.affects_differences:
            return False
        if (self.part is not None and self.part != part) or (self.kind is not None and self.kind != kind):
            return False
        if self.action == "keyed-by":
            return compile_path_pattern(self.path, include_descendants=True).fullmatch(path) is not None
        if (self.action == "tolerate" and kind not in TOLERABLE_KINDS) or (
            self.action == "unordered" and kind != "order"
        ):
            return False
        return not self.path or self._covers(part, path)

    def explains(self, difference: Difference) -> bool:
        """Tell whether the rule explains a difference of a pair in its scope."""
        if not self.affects_differences:
            return False
        if (self.part is not None and self.part != difference.part) or (
            self.kind is not None and self.kind != difference.kind
        ):
            return False
        if self.path and not self._covers(difference.part, difference.path):
            return False
        if self.action == "tolerate":
            return difference.kind in TOLERABLE_KINDS and self._tolerates(difference)
        if self.action in {"unordered", "keyed-by"}:
            return difference.kind == "order"
        return self.action == "ignore" or self._is_expected(difference)

    def _covers(self, part: str, path: str) -> bool:
        if part == "header":
            return _matches(self.path.lower(), path.lower())
        exactly = self.action in {"unordered", "keyed-by"}
        return compile_path_pattern(self.path, include_descendants=not exactly).fullmatch(path) is not None

    def _tolerates(self, difference: Difference) -> bool:
        old, new = _parse_number(difference.old), _parse_number(difference.new)
        if old is None or new is None:
            return False
        distance = abs(new - old)
        return (self.absolute is not None and distance <= self.absolute * (1 + 1e-9)) or (
            self.relative is not None and distance <= self.relative * abs(old) * (1 + 1e-9)
        )

    def _is_expected(self, difference: Difference) -> bool:
        return (self.old is UNSET or _equals_json(difference.old, self.old)) and (
            self.new is UNSET or _equals_json(difference.new, self.new)
        )


@dataclass(frozen=True, slots=True)
class RuleSet:
    rules: tuple[Rule, ...] = ()
    keyed_by_rules: tuple[Rule, ...] = field(init=False, default=())
    _by_scope: dict[tuple[object, ...], RuleSet] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keyed_by_rules", tuple(rule for rule in self.rules if rule.action == "keyed-by"))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def for_scope(self, scope: RuleScope) -> RuleSet:
        """Select the rules that apply. The result is cached: most traffic has few endpoints, releases and statuses."""
        key = (scope.service, scope.endpoint, scope.new_release, scope.statuses)
        rule_set = self._by_scope.get(key)
        if rule_set is None:
            if len(self._by_scope) >= MAX_CACHED_SCOPES:
                self._by_scope.clear()
            rule_set = RuleSet(tuple(rule for rule in self.rules if rule.applies(scope)))
            self._by_scope[key] = rule_set
        return rule_set

    def active_on(self, day: dt.date) -> RuleSet:
        """Select the rules that are not expired."""
        return RuleSet(tuple(rule for rule in self.rules if rule.expires is None or day < rule.expires))

    def find_identity_field(self, path: str) -> str:
        """Return the field that identifies the elements of the array at a generalised path, or an empty text."""
        for rule in self.keyed_by_rules:
            if not rule.path or compile_path_pattern(rule.path, include_descendants=False).fullmatch(path):
                return rule.by
        return ""

    def explain(self, differences: Iterable[Difference]) -> list[Difference]:
        """Set `explained_by` of the differences that a rule explains."""
        names = ((item, next((rule.name for rule in self.rules if rule.explains(item)), None)) for item in differences)
        return [item if name is None else replace(item, explained_by=name) for item, name in names]


@lru_cache(maxsize=4096)
def compile_path_pattern(pattern: str, *, include_descendants: bool) -> re.Pattern[str]:
    """Compile a path pattern: `.*` matches any key, `[*]` any element, `.**` any number of steps."""
    pieces = []
    for token in _PATTERN_TOKENS.finditer(pattern):
        if token["any"]:
            pieces.append(f"{_STEP_PATTERN}*")
        elif token["key"]:
            pieces.append(_STEP_PATTERN)
        elif token["index"] or token["exact"]:
            pieces.append(r"\[\*\]")
        else:
            pieces.append(re.escape(token[0]))
    return re.compile("".join(pieces) + (rf"(?:{_STEP_PATTERN})*" if include_descendants else ""))


@lru_cache(maxsize=4096)
def _compile_glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _matches(pattern: str, text: str) -> bool:
    return not pattern or pattern == text or _compile_glob(pattern).match(text) is not None


def matches_statuses(pattern: str, statuses: tuple[int, int]) -> bool:
    """Match both statuses with `404`, or the change with `404->200`. `x` is any digit, `*` any status."""
    if not pattern:
        return True
    before, arrow, after = pattern.partition("->")
    return all(
        _matches_code(expected, status)
        for expected, status in zip((before, after if arrow else before), statuses, strict=True)
    )


def _matches_code(expected: str, status: int) -> bool:
    text = str(status)
    expected = expected.strip().lower()
    return expected == "*" or (
        len(expected) == len(text)
        and all(expected_char in {"x", char} for expected_char, char in zip(expected, text, strict=True))
    )


def _parse_number(text: str | None) -> float | None:
    """Return the number of a JSON text: a number, a number in a string, or a timestamp in seconds."""
    value = _parse_json(text)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return _parse_seconds(value) if isinstance(value, str) else None


def _parse_seconds(text: str) -> float | None:
    try:
        timestamp = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return (timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=dt.UTC)).timestamp()


def _parse_json(text: str | None) -> Any:
    try:
        return None if text is None else orjson.loads(text)
    except orjson.JSONDecodeError:  # a truncated text
        return None


def _equals_json(text: str | None, expected: Any) -> bool:
    if text is None:
        return False
    value = _parse_json(text)
    return type(value) is type(expected) and bool(value == expected)


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Settings of a comparison."""

    volatile_headers: frozenset[str] = VOLATILE_HEADERS  # lower case
    max_differences: int = 200
    max_decoded_bytes: int = 16 * 1024 * 1024  # limit for a compressed body
    max_work: int = 600_000  # steps of about 1 µs; beyond it, values are compared as a whole
    rule_set: RuleSet | None = None  # the active rules

    @classmethod
    def with_ignored_headers(cls, headers: tuple[str, ...]) -> CompareOptions:
        """Add response headers to those that are not compared."""
        return cls(volatile_headers=VOLATILE_HEADERS | {name.lower() for name in headers})
