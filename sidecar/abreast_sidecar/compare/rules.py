"""Rules: declarations of known differences that are ignored, tolerated or expected."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args

import orjson
from msgspec import UNSET, Meta
from msgspec.structs import replace

from abreast_sidecar.compare.endpoints import NO_TEMPLATES, EndpointTemplates
from abreast_sidecar.compare.model import VOLATILE_HEADERS, Difference, Kind, Part

Action = Literal["ignore", "tolerate", "unordered", "keyed-by", "expect", "waive-coverage"]
ACTIONS: tuple[Action, ...] = get_args(Action)
MAX_FIELD_CHARS = 500
MAX_RECURSIVE_WILDCARDS = 4  # `**` of a pattern
# The kinds of differences that an action can explain, if these are not all.
_KINDS_OF_ACTION: dict[Action, frozenset[str]] = {
    "tolerate": frozenset({"changed", "format", "range"}),  # with a value on both sides
    "unordered": frozenset({"order"}),
    "keyed-by": frozenset({"order"}),
    "waive-coverage": frozenset(),  # only affects the verdict
}
MAX_CACHED_SCOPES = 4096
_STEP_PATTERN = r"(?>\.\*|\.\$|\.[A-Za-z_@#][\w-]*|\[\*\]|\[\"(?:[^\"\\]|\\.)*\"\])"
_STEP_END = r"(?=[.\[]|\Z)"
_PATTERN_TOKENS = re.compile(
    r"(?P<any>\.\*\*|\*\*)|(?P<key>\.\*)|(?P<index>\[(?:\*?|\d+)\])|(?P<part>[^*\[.]+|.)", re.DOTALL
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


def _limit(expected: str, schema: dict[str, Any] | None = None, **constraints: Any) -> Meta:
    """Limit a field. `expected` completes `<field> must be`; `schema` overrides the JSON schema of the type."""
    return Meta(extra={"expected": expected, **({"schema": schema} if schema else {})}, **constraints)


Text = Annotated[
    str,
    _limit(
        f"text of 1 to {MAX_FIELD_CHARS} characters",
        {"type": ["string", "number"]},
        min_length=1,
        max_length=MAX_FIELD_CHARS,
    ),
]
PathPattern = Annotated[
    Text, _limit(f"a pattern of 1 to {MAX_FIELD_CHARS} characters, with `**` at most {MAX_RECURSIVE_WILDCARDS} times")
]
StatusPattern = Annotated[
    str,
    _limit(
        "a status such as 404, 4xx or 404->200",
        {"type": ["string", "integer"]},
        pattern=r"^ *([1-5xX][0-9xX]{2}|\*) *(-> *([1-5xX][0-9xX]{2}|\*) *)?$",
    ),
]
SHARE_SCHEMA = {"type": ["number", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?\s*%$"}
JSON_VALUE_SCHEMA = {"type": ["string", "number", "boolean", "null"]}
Amount = Annotated[float, _limit("a number that is not negative", ge=0)]
Share = Annotated[float, _limit("a share such as 0.01 or 1%", SHARE_SCHEMA, ge=0)]
Day = Annotated[dt.date, _limit("a day such as 2030-01-31")]
JsonValue = Annotated[Any, _limit("a JSON value; quote a text that looks like a date", JSON_VALUE_SCHEMA)]


@dataclass(frozen=True, slots=True)
class RuleScope:
    """The origin of a pair of responses, to which a rule may be limited."""

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

    def may_match(self, part: str, path: str, kind: str) -> bool:
        """Tell whether the rule can explain or, for keyed-by, avoid such a difference, whatever its values are."""
        if self.action == "keyed-by":
            pattern = compile_path_pattern(self.path, include_descendants=True)
            return self.part in {None, part} and self.kind in {None, kind} and pattern.fullmatch(path) is not None
        return self._covers(part, path, kind)

    def explains(self, difference: Difference) -> bool:
        """Tell whether the rule explains a difference of a pair in its scope."""
        if not self._covers(difference.part, difference.path, difference.kind):
            return False
        if self.action == "tolerate":
            return self._tolerates(difference)
        if self.action == "expect":
            return all(
                expected is UNSET or _equals_json(text, expected)
                for text, expected in ((difference.old, self.old), (difference.new, self.new))
            )
        return True

    def _covers(self, part: str, path: str, kind: str) -> bool:
        if (self.part is not None and self.part != part) or (self.kind is not None and self.kind != kind):
            return False
        if kind not in _KINDS_OF_ACTION.get(self.action, (kind,)):
            return False
        if not self.path:
            return True
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
    """Compile a path pattern: `.*` matches any key, `[*]` any element, `.**` any number of steps.

    A match takes steps of the path times steps of the pattern. Between two `.**`, the first match is as good as any
    other, so its group is atomic and never tries another one.
    """
    pieces = [""]  # between `.**`
    for token in _PATTERN_TOKENS.finditer(pattern):
        if token.lastgroup == "any":
            pieces.append("")
        else:
            wildcards = {"key": _STEP_PATTERN, "index": r"\[\*\]"}
            pieces[-1] += wildcards.get(str(token.lastgroup)) or re.escape(token[0])
    if include_descendants:
        pieces.append("")
    first, *others = pieces
    if not others:
        return re.compile(first)
    last = others.pop()
    middle = "".join(f"(?>{_STEP_PATTERN}*?{piece}{_STEP_END})" for piece in others if piece)
    return re.compile(f"{first}{middle}{_STEP_PATTERN}*{last}")


@lru_cache(maxsize=4096)
def _compile_glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _matches(pattern: str, text: str) -> bool:
    return not pattern or pattern == text or _compile_glob(pattern).match(text) is not None


def matches_statuses(pattern: str, statuses: tuple[int, int]) -> bool:
    """Match both statuses with `404`, or the change with `404->200`. `x` is any digit, `*` any status."""
    if not pattern:
        return True
    before, arrow, after = pattern.lower().replace("*", r"\d+").replace("x", r"\d").partition("->")
    expected_statuses = before.strip(), after.strip() if arrow else before.strip()
    return all(
        re.fullmatch(expected, str(status)) for expected, status in zip(expected_statuses, statuses, strict=True)
    )


def _parse_number(text: str | None) -> float | None:
    """Return the number of a JSON text: a number, a number in a string, or a timestamp in seconds."""
    value = _parse_json(text)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    with suppress(ValueError, OverflowError):
        return float(value)
    with suppress(ValueError):
        timestamp = dt.datetime.fromisoformat(str(value))
        return (timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=dt.UTC)).timestamp()
    return None


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
    templates: EndpointTemplates = NO_TEMPLATES

    @classmethod
    def with_ignored_headers(cls, headers: tuple[str, ...]) -> CompareOptions:
        """Add response headers to those that are not compared."""
        return cls(volatile_headers=VOLATILE_HEADERS | {name.lower() for name in headers})
