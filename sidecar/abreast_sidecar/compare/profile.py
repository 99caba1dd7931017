"""What a place that is always noisy still has to keep: type, null, shape, format, length and range.

A profile is learned from what old answered at one place. It is bounded, can be merged, and is plain enough to be stored.
A value of new that does not fit is a difference of its own place (the path with the kind `form`), with counts of its own
in both streams, so that what old does now and then by itself is found to be noise like anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abreast_sidecar.compare.shape import shape

MOST_FORMATS = 4  # of one kind; beyond, any will do
ENOUGH = 20  # values, before lengths and ranges are held against anything
LOOSE = frozenset(
    {"text", "word", "path", "digits", "decimal", "integer", "float", "unix", "unix text", "url"}
)
ANY = "of any format"

Form = tuple[str, str]
Forms = frozenset[Form]


@dataclass(frozen=True, slots=True)
class Profile:
    """Of all values of one place so far."""

    values: int = 0
    forms: Forms = frozenset()  # kind and format; for a text, word or number the kind alone
    low: float | None = None  # of numbers
    high: float | None = None
    longest: int = 0  # characters or items

    def add(self, value: Any) -> Profile:
        number = _number(value)
        return Profile(
            values=self.values + 1,
            forms=_with(self.forms, _form(value)),
            low=_least(self.low, number),
            high=_greatest(self.high, number),
            longest=max(self.longest, _length(value)),
        )

    def merge(self, other: Profile) -> Profile:
        forms = self.forms
        for form in sorted(other.forms):
            forms = _with(forms, form)
        return Profile(
            self.values + other.values,
            forms,
            _least(self.low, other.low),
            _greatest(self.high, other.high),
            max(self.longest, other.longest),
        )


def misfit(profile: Profile, value: Any) -> str | None:
    """What is wrong with a value at a place that old answered with such values, or None."""
    if not profile.values:
        return None
    form = _form(value)
    if not _has(profile.forms, form):
        known = ", ".join(sorted(_named(one) for one in profile.forms))
        return f"{_named(form)} where old has {known}"
    if profile.values < ENOUGH:
        return None
    return _beyond(profile, _number(value)) or _too_long(profile, _length(value))


def _has(forms: Forms, form: Form) -> bool:
    return form in forms or (form[0], ANY) in forms


def _with(forms: Forms, form: Form) -> Forms:
    """Where a kind comes in many formats, none of them is one."""
    if _has(forms, form):
        return forms
    of_kind = {one for one in forms if one[0] == form[0]}
    if form[1] == ANY or len(of_kind) >= MOST_FORMATS:
        return (forms - of_kind) | {(form[0], ANY)}
    return forms | {form}


def _beyond(profile: Profile, number: float | None) -> str | None:
    """Further outside than old's own values are apart; a sign that old never has."""
    if number is None or profile.low is None or profile.high is None:
        return None
    margin = max(profile.high - profile.low, abs(profile.high) / 2)
    low, high = profile.low - margin, profile.high + margin
    if profile.low >= 0:
        low = max(low, 0.0)
    if low <= number <= high:
        return None
    return f"{number:g} where old has {profile.low:g} to {profile.high:g}"


def _too_long(profile: Profile, length: int) -> str | None:
    if length <= 4 * profile.longest + 16:
        return None
    return f"of length {length} where old's longest is {profile.longest}"


def _form(value: Any) -> Form:
    """A number is a number: whether it is near a time says nothing of its form. A float is none of an integer's."""
    found = shape(value)
    if found.kind == "unix":
        return ("integer", "")
    if found.kind in LOOSE and found.format != "not finite":
        return ("text" if found.kind in {"word", "path", "url"} else found.kind, "")
    return ("text", "") if found.kind == "email" else (found.kind, found.format)


def _named(form: Form) -> str:
    return " ".join(part for part in form if part)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        return None
    return float(value) if abs(value) < 10**300 else None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list) else 0


def _least(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return min(known) if known else None


def _greatest(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None
