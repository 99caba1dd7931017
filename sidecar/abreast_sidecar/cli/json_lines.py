"""JSON one value a line, and otherwise exactly as it was sent: numbers, escapes, duplicate keys."""

from __future__ import annotations

import json
import re

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[\s*\]|\{\s*\}|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
INDENT = "  "


def json_lines(text: str) -> list[str] | None:
    """None where the text is no JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    found, depth = [""], 0
    for piece in TOKEN.findall(text):
        if piece in "]}":
            depth -= 1
            found.append(INDENT * depth)
        found[-1] += ": " if piece == ":" else "".join(piece.split()) if piece[0] in "[{" else piece
        if piece in "[{":
            depth += 1
        if piece in "[{,":
            found.append(INDENT * depth)
    return found
