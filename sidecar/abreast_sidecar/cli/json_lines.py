"""JSON one value a line, and otherwise exactly as it was sent: numbers, escapes, duplicate keys."""

from __future__ import annotations

import json
import re

JSON_TOKEN_PATTERN = re.compile(r'"(?:[^"\\]|\\.)*"|\[\s*\]|\{\s*\}|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
JSON_INDENT = "  "


def split_json_lines(text: str) -> list[str] | None:
    """None where the text is no JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    lines, depth = [""], 0
    for token in JSON_TOKEN_PATTERN.findall(text):
        if token in "]}":
            depth -= 1
            lines.append(JSON_INDENT * depth)
        lines[-1] += ": " if token == ":" else "".join(token.split()) if token[0] in "[{" else token
        if token in "[{":
            depth += 1
        if token in "[{,":
            lines.append(JSON_INDENT * depth)
    return lines
