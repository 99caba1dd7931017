"""Differences between what two versions did, or would have done, beside their answers.

Effects of one kind and key are compared in their order; between kinds and keys the order means nothing, since code that
waits for several things at once does them in any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from abreast.capture import Capture
from abreast_sidecar.compare.array import match
from abreast_sidecar.compare.difference import Difference, Kind
from abreast_sidecar.compare.document import PER_PATH, DocumentDiff
from abreast_sidecar.compare.value import shown

Effect = Mapping[str, Any]
Name = tuple[str, str]  # kind and key

TOO_MANY = "more effects than a capture holds: the first were compared"


def effect_differences(
    old: Capture, new: Capture, limit: int, keyed: Callable[[str], str] | None = None
) -> list[Difference]:
    """At `email.send` one that is missing, extra or out of order; at `email.send.$.to` what one says."""
    if not (old.effects or new.effects):
        return []
    before, after = _by_name(old), _by_name(new)
    found: list[Difference] = []
    for name in before | after:
        ours, theirs = before.get(name, []), after.get(name, [])
        if ours != theirs:
            found += _named(name, ours, theirs, limit, keyed)
    return found[:limit]


def _by_name(capture: Capture) -> dict[Name, list[Any]]:
    named: dict[Name, list[Any]] = {}
    for effect in capture.effects:
        if not effect.get("note"):
            name = str(effect.get("kind", "")), str(effect.get("key", ""))
            named.setdefault(name, []).append(said(effect))
    return named


def said(effect: Effect) -> Any:
    """The payload; of one that was too long what is known. That it failed is no difference: a shadow does not try."""
    if "digest" in effect:
        return {"digest": effect["digest"], "length": effect.get("length", 0)}
    return effect.get("payload")


def _named(
    name: Name, old: list[Any], new: list[Any], limit: int, keyed: Callable[[str], str] | None
) -> list[Difference]:
    kind, _ = name
    matching = match(old, new)
    found = [_whole(name, "removed", old[place], None) for place in matching.removed[:PER_PATH]]
    found += [_whole(name, "added", None, new[place]) for place in matching.added[:PER_PATH]]
    if matching.moved:
        found.append(_whole(name, "order", old, new))
    documents = DocumentDiff(limit, root=f"{kind}.$", keyed=keyed)
    for place, other in matching.pairs:
        documents.compare(old[place], new[other])
    return found + [replace(difference, part="effect") for difference in documents.found]


def _whole(name: Name, kind: Kind, old: Any, new: Any) -> Difference:
    """An effect that is gone may be a mail that nobody gets; one more is seen by others than this client."""
    path, key = name
    return Difference.told(
        part="effect",
        path=path,
        place=f"{path}[{key}]" if key else path,
        kind=kind,
        impact="breaking" if kind == "removed" else "value",
        old=None if kind == "added" else shown(old),
        new=None if kind == "removed" else shown(new),
    )
