"""What both versions did beside their answers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import printable, seconds
from abreast_sidecar.cli.tables import STYLES, role_name, table, version_name

LONGEST_PAYLOAD = 100  # characters


def effects(captures: Sequence[api.CaptureDetail]) -> Table | None:
    """One row an effect, in each capture's order; None where there is none."""
    made = table("", "effect", "at", "what", "", right=frozenset({"at"}))
    for capture in captures:
        version = version_name(capture.version)
        who = Text(f"{version} {role_name(capture.role)}", STYLES.get(version, ""))
        for effect in capture.effects:
            name = f"{effect.kind}[{effect.key}]" if effect.key else effect.kind
            at = "+" + seconds(effect.start.ToNanoseconds() / 1e9)
            made.add_row(
                who, printable(name), at, printable(effect.payload, LONGEST_PAYLOAD), _note(capture, effect)
            )
        if capture.effects_dropped:
            made.add_row(who, f"and {capture.effects_dropped} more", "", "", "not recorded")
    return made if made.row_count else None


def _note(capture: api.CaptureDetail, effect: api.Effect) -> str:
    if effect.note:
        return "note"
    if effect.error:
        return f"raised {printable(effect.error)}"
    return "" if capture.role == common.ROLE_LIVE else "held back"
