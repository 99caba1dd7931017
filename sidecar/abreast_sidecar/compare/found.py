"""Differences whose texts are written when someone reads them: most only count for what is known already."""

from __future__ import annotations

from typing import Any

from abreast_sidecar.compare.difference import Difference, Impact, Kind, Part
from abreast_sidecar.compare.path import Place
from abreast_sidecar.compare.value import shown

_LAZY = frozenset({"place", "old", "new"})


class Found(Difference):
    """A difference in a document. To everyone else it is a Difference, equal to one that says the same."""

    __slots__ = ("_at",)
    _at: Place

    def __getattr__(self, name: str) -> Any:
        """Called for a field that was not set yet."""
        if name not in _LAZY:
            raise AttributeError(name)
        at = self._at
        value: str | None
        if name == "place":
            value = at.exact()
        elif name == "old":
            value = None if self.kind == "added" else shown(at.old)
        else:
            value = None if self.kind == "removed" else shown(at.new)
        object.__setattr__(self, name, value)
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Difference) and self.plain() == (
            other.plain() if isinstance(other, Found) else other
        )

    def __hash__(self) -> int:
        return hash(self.plain())

    def __reduce__(self) -> tuple[Any, ...]:
        return Difference, tuple(getattr(self, name) for name in Difference.__dataclass_fields__)

    def place_of(self) -> Place:
        """With both values as they were, not as text."""
        return self._at

    def plain(self) -> Difference:
        return Difference(*(getattr(self, name) for name in Difference.__dataclass_fields__))


_new = object.__new__
_set_part, _set_path, _set_kind, _set_impact, _set_explained, _set_hint = (
    getattr(Difference, name).__set__ for name in ("part", "path", "kind", "impact", "explained_by", "hint")
)
_set_at = vars(Found)["_at"].__set__


def found_at(at: Place, path: str, kind: Kind, impact: Impact, hint: str) -> Difference:
    """A frozen dataclass sets its fields one by one, by name; this takes a third of the time."""
    found = _new(Found)
    _set_part(found, "body")
    _set_path(found, path)
    _set_kind(found, kind)
    _set_impact(found, impact)
    _set_explained(found, "")
    _set_hint(found, hint)
    _set_at(found, at)
    return found


def as_kind(found: Found, kind: Kind, impact: Impact) -> Difference:
    """The same difference, told more exactly. Nobody may have seen it yet."""
    _set_kind(found, kind)
    _set_impact(found, impact)
    return found


def as_part(found: Difference, part: Part) -> Difference:
    """The same difference, of a document that stands elsewhere than in the body. Nobody may have seen it yet."""
    _set_part(found, part)
    return found
