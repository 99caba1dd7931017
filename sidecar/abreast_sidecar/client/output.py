"""Terminal output: numbers, times and tables for people, JSON for scripts.

Values from requests and responses are untrusted: `to_printable` escapes them, and Rich markup is off.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, NoReturn

import click
import humanize
import rich.console
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as comparison
from abreast_sidecar.client.sidecar_client import Page

JSON_TOKEN_PATTERN = re.compile(r'"(?:[^"\\]|\\.)*"|\[\s*\]|\{\s*\}|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
JSON_INDENT = "  "
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
DURATION_UNITS = ((DAY_S, "d", HOUR_S, "h"), (HOUR_S, "h", MINUTE_S, "min"), (MINUTE_S, "min", 1, "s"))
MAX_TABLE_VALUE_CHARS = 200
PIPED_TABLE_COLUMNS = 400  # wide enough that each row is one line, for grep
STYLE_BY_WORD = {
    "breaks clients": "bold red",
    "changed value": "yellow",
    "addition": "cyan",
    "breaking": "bold red",
    "value": "yellow",
    "additive": "cyan",
    "noise": "dim",
    "mismatch": "red",
    "match": "green",
    "old": "blue",
    "new": "magenta",
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
}

IMPACT_LABELS: dict[int, str] = {
    common.IMPACT_BREAKING: "breaks clients",
    common.IMPACT_VALUE: "changed value",
    common.IMPACT_ADDITIVE: "addition",
}
KIND_PHRASES: dict[int, str] = {
    common.KIND_ADDED: "added in new",
    common.KIND_REMOVED: "missing in new",
    common.KIND_CHANGED: "value changed",
    common.KIND_TYPE: "type changed",
    common.KIND_ORDER: "order changed",
    common.KIND_FORMAT: "format changed",
    common.KIND_RANGE: "value far from old's",
    common.KIND_SLOWER: "new is slower",
}
RECOMMENDATIONS = {
    comparison.VERDICT_STATE_PASS: "Yes. {} is within its limits.",
    comparison.VERDICT_STATE_FAIL: "No. {} exceeds its limits.",
    comparison.VERDICT_STATE_INCONCLUSIVE: "Not yet. The evidence on {} is too small or incomplete.",
}
VERSIONS: tuple[Literal["old", "new"], ...] = ("old", "new")


class Console(rich.console.Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def make_console(width: int | None = None) -> Console:
    if width is None and not sys.stdout.isatty():
        width = PIPED_TABLE_COLUMNS
    return Console(width=width, markup=False, highlight=False, emoji=False)


def message_to_json(message: Any, *, indent: int | None = 2) -> str:
    """Convert with the field names of the protos. As in all protobuf JSON, 64-bit integers are strings."""
    return json_format.MessageToJson(
        message, indent=indent, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def print_json(message: Any, *, indent: int | None = 2) -> None:
    click.echo(message_to_json(message, indent=indent))


def print_list(out: Console, response: Page, rows: Sequence[Any], table: Table, *, empty: str, item: str = "") -> None:
    """Print the rows of a list as a table, or the text `empty`.

    A further line states whether there are more rows. `item` is the command that shows one row, such as `finding`: a
    terminal then gets a hint at that command.
    """
    if not rows:
        out.print(empty)
        return
    out.print(table)
    more_text = "; there are more: raise --limit, or add a filter" if response.next_page_token else ""
    if more_text and (total := getattr(response, "total_size", 0)):
        more_text = f" of {format_count(total)}: raise --limit, or add a filter"
    hint = f". For details: abreast {item} {to_printable(str(rows[0].id))}" if item and out.is_terminal else ""
    if more_text or hint:
        out.print(f"\n{format_quantity(len(rows), item or 'row')}{more_text}{hint}", style="dim")


def split_json_lines(text: str) -> list[str] | None:
    """Format JSON with one value per line, and keep each value as it was sent. Return None if it is not JSON."""
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


def format_count(number: int) -> str:
    return f"{number:,}"


def format_quantity(number: int, singular: str, plural: str = "") -> str:
    """Return `1 finding` or `2 findings`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_percent(share: float) -> str:
    """Format with enough digits to distinguish 0.5% from 0%, and 99.95% from 100%."""
    value = share * 100
    if value in {0.0, 100.0}:
        return f"{value:.0f}%"
    if value < 0.0001:
        return "<0.0001%"
    digits = 1 if 1 <= value <= 99 else 2 if 0.1 <= value <= 99.99 else 4
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + "%"


def format_share_of(part: int, total: int) -> str:
    """Format a share that is never rounded to 0% or 100%. Return "" if `part` is not a part of `total`."""
    if not 0 <= part <= total or not total:
        return ""
    share = part / total
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"


def format_seconds(value: float) -> str:
    """Format as 3 µs, 4.1 ms, 120 ms, 1.25 s, 3 min 20 s, 5 h or 2 d 3 h.

    humanize has no compact form below a second, and spells units out above it.
    """
    if value < 0:
        return "-" + format_seconds(-value)
    if value < 0.0009995:
        return f"{value * 1e6:.0f} µs" if value else "0 s"
    if value < 0.9995:
        milliseconds = value * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if value < 59.95:
        return f"{value:.2f}".rstrip("0").rstrip(".") + " s" if value < 9.995 else f"{value:.0f} s"
    for size, unit, step, smaller_unit in DURATION_UNITS:
        if value >= size:
            units, remainder = divmod(round(value / step) * step, size)
            return f"{units:.0f} {unit}" + (f" {remainder // step:.0f} {smaller_unit}" if remainder >= step else "")
    return "1 min"


def format_duration(value: Duration) -> str:
    return format_seconds(value.seconds + value.nanos / 1e9)


def format_bytes(byte_count: int) -> str:
    return humanize.naturalsize(byte_count).replace("Byte", "byte").replace("kB", "KB")


def format_age(moment: Timestamp, current_time: dt.datetime) -> str:
    elapsed_s = (current_time - moment.ToDatetime(dt.UTC)).total_seconds()
    return "now" if elapsed_s < 1 else f"{format_seconds(int(elapsed_s))} ago"


def format_local_time(moment: Timestamp) -> str:
    return moment.ToDatetime(dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def to_printable(text: str, max_chars: int = 0) -> str:
    """Escape control characters, which could control the terminal, and shorten a long text in the middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if max_chars and len(text) > max_chars:
        half = (max_chars - 1) // 2
        text = f"{text[: max_chars - 1 - half]}…{text[len(text) - half :]}"
    return text


def make_table(
    *columns: str, numeric_columns: Collection[str] = (), rows: Iterable[Iterable[RenderableType]] = ()
) -> Table:
    """Make a table without frames. Numeric columns are right-aligned and never wrapped."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        is_numeric = name in numeric_columns
        table.add_column(name, justify="right" if is_numeric else "left", no_wrap=is_numeric, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def make_grid(rows: Iterable[Iterable[RenderableType | None]]) -> Table:
    """Make a table without a header, such as names and values. Leave out a row with None."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for row in map(list, rows):
        if None not in row:
            grid.add_row(*row)
    return grid


def style_text(text: str, style: str = "") -> Text:
    """Return the text in the style of a word such as `fail` (default: of the text itself), or in a Rich style."""
    rich_style = style if " " in style or style in {"dim", "bold"} else ""
    return Text(to_printable(text), STYLE_BY_WORD.get(style or text, rich_style))


def enum_name(enum: Any, number: int) -> str:
    """Convert a value of an enum of the API, such as OUTCOME_ONLY_OLD, to `only old`."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return str(enum.Name(number)).removeprefix(prefix).lower().replace("_", " ")


outcome_name = functools.partial(enum_name, common.Outcome)
version_name = functools.partial(enum_name, common.Version)
role_name = functools.partial(enum_name, common.Role)
part_name = functools.partial(enum_name, common.Part)
kind_name = functools.partial(enum_name, common.Kind)
impact_name = functools.partial(enum_name, common.Impact)


def impact_label(impact: int) -> str:
    """Describe the effect on a client."""
    return IMPACT_LABELS.get(impact, "")


def kind_phrase(kind: int) -> str:
    """Describe the change from old to new."""
    return KIND_PHRASES.get(kind, "")


def describe_feature(feature: comparison.RequestFeature) -> str:
    """Describe how a feature of requests relates to a finding."""
    affected_share, share = (
        format_share_of(round(1000 * part), 1000) for part in (feature.coverage, feature.precision)
    )
    text = to_printable(feature.text)
    who = "All affected requests have" if feature.coverage == 1 else f"{affected_share} of the affected requests have"
    return f"{who} {text}; {share} of the requests with {text} are affected"


def endpoint_name(endpoint: common.Endpoint) -> str:
    return to_printable(f"{endpoint.method} {endpoint.route}")


def format_decision(verdict: comparison.GetVerdictResponse) -> str:
    """Return the decision as a sentence."""
    subject = f"Release {to_printable(verdict.release)}" if verdict.release else "The new version"
    if verdict.state == comparison.VERDICT_STATE_INCONCLUSIVE:
        subject = subject[0].lower() + subject[1:]
    return RECOMMENDATIONS[verdict.state].format(subject)


def format_recommendation(verdict: comparison.GetVerdictResponse) -> str:
    """Return the decision with the gravest reason."""
    if verdict.state == comparison.VERDICT_STATE_PASS or not verdict.reasons:
        return format_decision(verdict)
    reason = verdict.reasons[0]
    place = f"{endpoint_name(reason.endpoint)}: " if reason.HasField("endpoint") else ""
    return f"{format_decision(verdict).removesuffix('.')}: {place}{to_printable(reason.text)}."


def format_location(part: common.Part.ValueType, path: str) -> str:
    """Return a location such as `$.items[*].price`, `header cache-control` or `status`."""
    if part == common.PART_BODY and path:
        return to_printable(path)
    return to_printable(f"{part_name(part)} {path}" if path else part_name(part))


def build_differences_table(differences: Iterable[common.Difference]) -> Table:
    """Build a table with one row per difference, with both values."""
    table = make_table("location", "kind", "impact", "old", "new")
    for difference in differences:
        if difference.explained_by:
            remark = f"explained by rule {difference.explained_by}"
        elif difference.drift:
            remark = "drift"
        else:
            remark = "noise" if difference.noise else impact_label(difference.impact)
        values = (
            style_text(to_printable(getattr(difference, version), MAX_TABLE_VALUE_CHARS), version)
            if difference.HasField(version)
            else style_text("-", "dim")
            for version in VERSIONS
        )
        location = format_location(difference.part, difference.exact_path or difference.path)
        table.add_row(location, kind_name(difference.kind), style_text(remark), *values)
    return table
