"""Differences between the effects of two versions.

Effects of one kind and key are compared in order. The order between kinds and keys means nothing: concurrent code may
run effects in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.json_diff import MAX_DIFFERENCES_PER_PATH, JsonDiff, match_elements
from abreast_sidecar.compare.model import Difference, Kind
from abreast_sidecar.compare.values import render_value

RawEffect = Mapping[str, Any]
EffectName = tuple[str, str]  # kind and key

EFFECTS_DROPPED_NOTE = "a capture has more effects than its limit: only the first ones were compared"


def diff_effects(
    old: Capture, new: Capture, limit: int, identity_lookup: Callable[[str], str] | None = None
) -> list[Difference]:
    """Compare effects: as a whole at `email.send`, by their payloads at `email.send.$.to`."""
    if not (old.effects or new.effects):
        return []
    before, after = _group_by_name(old), _group_by_name(new)
    differences: list[Difference] = []
    for name in before | after:
        old_effects, new_effects = before.get(name, []), after.get(name, [])
        if old_effects != new_effects:
            differences += _diff_named_effects(name, old_effects, new_effects, limit, identity_lookup)
    return differences[:limit]


def _group_by_name(capture: Capture) -> dict[EffectName, list[Any]]:
    groups: dict[EffectName, list[Any]] = {}
    for effect in capture.effects:
        if not effect.get("note"):
            name = str(effect.get("kind", "")), str(effect.get("key", ""))
            groups.setdefault(name, []).append(describe_effect(effect))
    return groups


def describe_effect(effect: RawEffect) -> Any:
    """Return the payload, or its digest if it is too long. Failures don't count: a shadow does not run effects."""
    if "digest" in effect:
        return {"digest": effect["digest"], "length": effect.get("length", 0)}
    return effect.get("payload")


def _diff_named_effects(
    name: EffectName, old: list[Any], new: list[Any], limit: int, identity_lookup: Callable[[str], str] | None
) -> list[Difference]:
    kind, _ = name
    matching = match_elements(old, new)
    differences = [
        _whole_effect_difference(name, "removed", old[index], None)
        for index in matching.removed[:MAX_DIFFERENCES_PER_PATH]
    ]
    differences += [
        _whole_effect_difference(name, "added", None, new[index]) for index in matching.added[:MAX_DIFFERENCES_PER_PATH]
    ]
    if matching.is_reordered:
        differences.append(_whole_effect_difference(name, "order", old, new))
    diff = JsonDiff(limit, root=f"{kind}.$", identity_lookup=identity_lookup)
    for index, other_index in matching.pairs:
        diff.compare(old[index], new[other_index])
    return differences + [replace(difference, part="effect") for difference in diff.differences]


def _whole_effect_difference(name: EffectName, kind: Kind, old: Any, new: Any) -> Difference:
    """Describe an effect on one side only. A missing effect is breaking: it may be an email that nobody gets."""
    path, key = name
    return Difference.from_text(
        part="effect",
        path=path,
        exact_path=f"{path}[{key}]" if key else path,
        kind=kind,
        impact="breaking" if kind == "removed" else "value",
        old=None if kind == "added" else render_value(old),
        new=None if kind == "removed" else render_value(new),
    )
