"""What both versions did beside their answers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import format_seconds, to_printable
from abreast_sidecar.cli.tables import STYLE_BY_WORD, make_table, role_name, version_name

MAX_PAYLOAD_CHARS = 100  # characters


def build_effects_table(captures: Sequence[api.CaptureDetail]) -> Table | None:
    """One row an effect, in each capture's order; None where there is none."""
    table = make_table("", "effect", "at", "what", "", numeric_columns=frozenset({"at"}))
    for capture in captures:
        version = version_name(capture.version)
        source = Text(f"{version} {role_name(capture.role)}", STYLE_BY_WORD.get(version, ""))
        for effect in capture.effects:
            name = f"{effect.kind}[{effect.key}]" if effect.key else effect.kind
            offset = "+" + format_seconds(effect.start.ToNanoseconds() / 1e9)
            table.add_row(
                source,
                to_printable(name),
                offset,
                to_printable(effect.payload, MAX_PAYLOAD_CHARS),
                _format_effect_note(capture, effect),
            )
        if capture.effects_dropped:
            table.add_row(source, f"and {capture.effects_dropped} more", "", "", "not recorded")
    return table if table.row_count else None


def _format_effect_note(capture: api.CaptureDetail, effect: api.Effect) -> str:
    if effect.note:
        return "note"
    if effect.error:
        return f"raised {to_printable(effect.error)}"
    return "" if capture.role == common.ROLE_LIVE else "held back"
