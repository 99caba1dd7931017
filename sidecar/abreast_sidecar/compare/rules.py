"""What people declared about differences: to be ignored, tolerated, meant. Cheap where there are no rules."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Any, Literal

import orjson
from msgspec.structs import replace

from abreast_sidecar.compare.difference import Difference, Kind, Part

Action = Literal["ignore", "tolerate", "unordered", "keyed-by", "expect", "waive-coverage"]
ACTIONS: tuple[Action, ...] = ("ignore", "tolerate", "unordered", "keyed-by", "expect", "waive-coverage")
MAX_PATTERN = 500  # characters
MAX_ANY_DEPTH = 4  # `**` in a pattern
TOLERATED = frozenset({"changed", "format", "range"})  # kinds of two values that may be close
MAX_SUBJECTS = 4096  # kinds of answers for which is remembered which rules apply


@dataclass(frozen=True, slots=True)
class Subject:
    """What a rule may be limited to: whose answers these are."""

    service: str = ""
    endpoint: str = ""  # `GET /products/{id}`
    old_release: str = ""
    new_release: str = ""
    statuses: tuple[int, int] = (0, 0)  # old's, new's


@dataclass(frozen=True, slots=True)
class Rule:
    """Each set field narrows the rule. Names and endpoints may hold `*`, `?` and `[…]`, as in a shell."""

    name: str
    action: Action
    part: Part | None = None
    path: str = ""  # `$.items[*].price`, `$.**.updated_at`; for a header its name; all that is below too
    kind: Kind | None = None
    service: str = ""
    endpoint: str = ""
    status: str = ""  # of the answers: `404`, `4xx`, or what changed: `404->200`, `5xx->*`
    release: str = ""  # of the new version
    by: str = ""  # keyed-by: the field that names an element
    absolute: float | None = None  # tolerate: at most so far apart; of times, in seconds
    relative: float | None = None  # tolerate: as a share of the old number
    old: Any = None  # expect: this value, where `has_old`
    new: Any = None
    has_old: bool = False
    has_new: bool = False
    reason: str = ""
    owner: str = ""
    expires: dt.date | None = None  # the first day on which it no longer holds

    def applies(self, subject: Subject) -> bool:
        return (
            self.applies_to(subject.service, subject.endpoint)
            and self.applies_to_release(subject.new_release)
            and status_matches(self.status, subject.statuses)
        )

    def applies_to(self, service: str, endpoint: str) -> bool:
        return _matches(self.service, service) and _matches(self.endpoint, endpoint)

    def applies_to_release(self, release: str) -> bool:
        return _matches(self.release, release)

    @property
    def by_place(self) -> bool:
        """Whether part, path and kind decide alone, so that it can be applied where the values are not known any more."""
        return self.action == "ignore" or (self.action == "expect" and not (self.has_old or self.has_new))

    @property
    def of_answers(self) -> bool:
        """Whether it says something of differences; else it is the verdict's alone."""
        return self.action != "waive-coverage"

    def touches(self, part: str, path: str, kind: str) -> bool:
        """Whether there are values of such a difference that it explains; for keyed-by, also that it makes vanish."""
        if not self.of_answers:
            return False
        if (self.part is not None and self.part != part) or (self.kind is not None and self.kind != kind):
            return False
        if self.action == "keyed-by":
            return path_pattern(self.path, below=True).fullmatch(path) is not None
        if (self.action == "tolerate" and kind not in TOLERATED) or (
            self.action == "unordered" and kind != "order"
        ):
            return False
        return not self.path or self._covers(part, path)

    def explains(self, difference: Difference) -> bool:
        """Whether the rule covers a difference in an answer that it applies to."""
        if not self.of_answers:
            return False
        if (self.part is not None and self.part != difference.part) or (
            self.kind is not None and self.kind != difference.kind
        ):
            return False
        if self.path and not self._covers(difference.part, difference.path):
            return False
        if self.action == "tolerate":
            return difference.kind in TOLERATED and self._tolerates(difference)
        if self.action in {"unordered", "keyed-by"}:
            return difference.kind == "order"
        return self.action == "ignore" or self._expected(difference)

    def _covers(self, part: str, path: str) -> bool:
        if part == "header":
            return _matches(self.path.lower(), path.lower())
        exactly = self.action in {"unordered", "keyed-by"}
        return path_pattern(self.path, below=not exactly).fullmatch(path) is not None

    def _tolerates(self, difference: Difference) -> bool:
        old, new = _number(difference.old), _number(difference.new)
        if old is None or new is None:
            return False
        apart = abs(new - old)
        return (self.absolute is not None and apart <= self.absolute * (1 + 1e-9)) or (
            self.relative is not None and apart <= self.relative * abs(old) * (1 + 1e-9)
        )

    def _expected(self, difference: Difference) -> bool:
        return (not self.has_old or _same(difference.old, self.old)) and (
            not self.has_new or _same(difference.new, self.new)
        )


@dataclass(frozen=True, slots=True)
class RuleSet:
    rules: tuple[Rule, ...] = ()
    keyed: tuple[Rule, ...] = field(init=False, default=())
    _applying: dict[tuple[object, ...], RuleSet] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "keyed", tuple(rule for rule in self.rules if rule.action == "keyed-by"))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def of(self, subject: Subject) -> RuleSet:
        """Only those that apply. Remembered: few endpoints, releases and statuses make most of the traffic."""
        key = (subject.service, subject.endpoint, subject.new_release, subject.statuses)
        found = self._applying.get(key)
        if found is None:
            if len(self._applying) >= MAX_SUBJECTS:
                self._applying.clear()
            found = RuleSet(tuple(rule for rule in self.rules if rule.applies(subject)))
            self._applying[key] = found
        return found

    def on(self, day: dt.date) -> RuleSet:
        """Only those that hold on a day."""
        return RuleSet(tuple(rule for rule in self.rules if rule.expires is None or day < rule.expires))

    def identity(self, path: str) -> str:
        """The field that identifies the elements of the array at a generalised path, or nothing."""
        for rule in self.keyed:
            if not rule.path or path_pattern(rule.path, below=False).fullmatch(path):
                return rule.by
        return ""

    def explain(self, differences: Iterable[Difference]) -> list[Difference]:
        """The same differences; those that a rule covers carry its name."""
        return [self._explained(difference) for difference in differences]

    def _explained(self, difference: Difference) -> Difference:
        rule = next((rule for rule in self.rules if rule.explains(difference)), None)
        if rule is None:
            return difference
        return replace(difference, explained_by=rule.name)


_STEP = r"(?:\.\*|\.\$|\.[A-Za-z_@#][\w-]*|\[\*\]|\[\"(?:[^\"\\]|\\.)*\"\])"
_TOKENS = re.compile(
    r"(?P<any>\.\*\*|\*\*)|(?P<key>\.\*)|(?P<index>\[\*?\])|(?P<exact>\[\d+\])|(?P<part>[^*\[.]+|.)",
    re.DOTALL,
)


@lru_cache(maxsize=4096)
def path_pattern(pattern: str, *, below: bool) -> re.Pattern[str]:
    """A regular expression for generalised paths. `.*` is any one key, `[*]` any element, `.**` any steps or none."""
    made = []
    for found in _TOKENS.finditer(pattern):
        if found["any"]:
            made.append(f"{_STEP}*")
        elif found["key"]:
            made.append(_STEP)
        elif found["index"] or found["exact"]:
            made.append(r"\[\*\]")
        else:
            made.append(re.escape(found[0]))
    return re.compile("".join(made) + (rf"(?:{_STEP})*" if below else ""))


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    # {id} in a route is itself; only * ? [ ] are special.
    return re.compile(translate(pattern))


def _matches(pattern: str, text: str) -> bool:
    return not pattern or pattern == text or _glob(pattern).match(text) is not None


def status_matches(pattern: str, statuses: tuple[int, int]) -> bool:
    """`404`: both are; `404->200`: what it was and is; `x` and `*` stand for any digit or code."""
    if not pattern:
        return True
    before, arrow, after = pattern.partition("->")
    return all(
        _code(wanted, status)
        for wanted, status in zip((before, after if arrow else before), statuses, strict=True)
    )


def _code(wanted: str, status: int) -> bool:
    text = str(status)
    wanted = wanted.strip().lower()
    return wanted == "*" or (
        len(wanted) == len(text) and all(one in {"x", other} for one, other in zip(wanted, text, strict=True))
    )


def _number(text: str | None) -> float | None:
    """The number that a JSON text is; a string may hold one, or a moment (in seconds)."""
    value = _value(text)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return _seconds(value) if isinstance(value, str) else None


def _seconds(text: str) -> float | None:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()


def _value(text: str | None) -> Any:
    try:
        return None if text is None else orjson.loads(text)
    except orjson.JSONDecodeError:  # cut, or no JSON
        return None


def _same(text: str | None, wanted: Any) -> bool:
    if text is None:
        return False
    value = _value(text)
    return type(value) is type(wanted) and bool(value == wanted)
