"""`abreast pairs` and `abreast pair`: compared requests, and both responses of one."""

from __future__ import annotations

import datetime as dt
import difflib
import itertools
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abreast.export.redaction import HASH_PREFIX
from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.options import (
    EnumParamType,
    connection_options,
    json_option,
    limit_option,
    service_option,
    since_option,
    until_option,
)
from abreast_sidecar.client.output import (
    STYLE_BY_WORD,
    Console,
    build_differences_table,
    endpoint_name,
    format_bytes,
    format_duration,
    format_local_time,
    format_quantity,
    format_seconds,
    make_console,
    make_table,
    outcome_name,
    print_list,
    print_response,
    role_name,
    split_json_lines,
    style_text,
    to_printable,
    version_name,
)
from abreast_sidecar.client.sidecar_client import SidecarClient, build_time_window

URL_PLACEHOLDER = '"$URL"'  # only the reader knows which address to use
CURL_OWN_HEADERS = {"host", "content-length", "accept-encoding", "connection", "transfer-encoding", "x-request-id"}
MAX_CURL_BODY_BYTES = 4000  # a longer body does not fit on a line
UNESCAPED_BYTES = frozenset(range(32, 127)) - set(b"\\'")

PIPED_PAIR_COLUMNS = 120
MIN_SIDE_BY_SIDE_COLUMNS = 100
MAX_EXCEPTION_NAME_CHARS = 80
MAX_PAYLOAD_CHARS = 100
CONTEXT_LINES = 3  # equal lines around a difference
MAX_ALIGNED_LINES = 3000  # per side; difflib would need seconds for more
OLD_COLOUR, NEW_COLOUR = STYLE_BY_WORD["old"], STYLE_BY_WORD["new"]

MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 16, 60
BAR_COLUMN_INDEX = 4
TIMELINE_TEXT_COLUMNS = 52  # columns of the timeline without bars and notes
USUAL_NAME_CHARS = 14  # for example `old baseline 2`
MAX_SPAN_NAME_CHARS = 40
WAITING_MARK, SENDING_MARK = "─", "█"


@dataclass(frozen=True)
class LinePair:
    """A line of old next to its line of new. None if a side has no such line."""

    old: str | None
    new: str | None

    @property
    def is_equal(self) -> bool:
        return self.old == self.new


@dataclass(frozen=True)
class TimelineSpan:
    """One bar of the timeline, in seconds since the first arrival. `first_byte` is None if no response started."""

    name: str
    style: str
    arrival: float
    first_byte: float | None
    end: float
    note: str = ""
    children: tuple[TimelineSpan, ...] = ()  # spans of the request's own calls, in order of their start


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, such as /products/{id}.")
@click.option(
    "--outcome", "outcomes", multiple=True, type=EnumParamType("OUTCOME"), help="Only this outcome (repeatable)."
)
@click.option("--finding", type=click.IntRange(min=1), help="Only pairs that show this finding.")
@since_option
@until_option
@limit_option
@json_option
@connection_options
def pairs_command(
    link: SidecarClient,
    service: str,
    method: str,
    route: str,
    outcomes: tuple[common.Outcome.ValueType, ...],
    finding: int | None,
    since: dt.datetime | None,
    until: dt.datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the compared requests with their outcomes and findings, newest first.

    For both responses of one request, use `abreast pair ID`.
    """
    request = api.ListPairsRequest(
        service=service,
        method=method.upper(),
        route=route,
        outcomes=outcomes,
        finding_id=finding or 0,
        window=build_time_window(since, until),
    )
    response = link.list_rows(
        lambda calls: calls.comparison.ListPairs(request, timeout=calls.timeout_s), request, limit
    )
    print_response(response, print_pairs, as_json=as_json)


def print_pairs(out: Console, response: api.ListPairsResponse) -> None:
    empty = "no stored pair matches (for the number of pairs by outcome: abreast status)"
    print_list(out, response, response.pairs, build_pairs_table(response), empty=empty, item="pair")


def build_pairs_table(response: api.ListPairsResponse) -> Table:
    table = make_table("time", "outcome", "request", "old", "new", "user got", "findings", "pair")
    for pair in response.pairs:
        outcome = outcome_name(pair.outcome)
        table.add_row(
            format_local_time(pair.time),
            style_text(outcome, outcome),
            to_printable(f"{pair.endpoint.method} {pair.request}", 120),
            str(pair.old_status or "-"),
            str(pair.new_status or "-"),
            version_name(pair.live) if pair.live else "-",
            ", ".join(map(str, pair.finding_ids)) or "-",
            to_printable(pair.id),
        )
    return table


@click.command()
@click.argument("id")
@click.option("--full", is_flag=True, help="Include equal lines.")
@click.option("--url", default="", help="Address for the curl line, such as http://127.0.0.1:8002.")
@json_option
@connection_options
def pair_command(link: SidecarClient, id: str, full: bool, url: str, as_json: bool) -> None:  # noqa: A002  # the argument's name
    """Show one request: both responses, the differences, the effects and a timeline.

    ID is the value of the response header x-abreast-pair. `abreast pairs` and `abreast finding` print ids too.
    """
    request = api.GetPairRequest(id=id)
    response = link.call(lambda calls: calls.comparison.GetPair(request, timeout=calls.timeout_s))

    def print_text(out: Console, response: api.GetPairResponse) -> None:
        print_pair(out if out.is_terminal else make_console(PIPED_PAIR_COLUMNS), response.pair, full=full, url=url)

    print_response(response, print_text, as_json=as_json)


def print_pair(out: Console, detail: api.PairDetail, *, full: bool = False, url: str = "") -> None:
    pair = detail.pair
    heading = style_text(f"{outcome_name(pair.outcome)}", outcome_name(pair.outcome))
    heading.append(f"  {endpoint_name(pair.endpoint)}")
    out.print(heading)
    out.print(_build_pair_grid(detail))
    if not detail.captures:
        out.print(
            "\nthe responses of this pair are not stored: only some examples of each finding are (abreast findings)"
        )
        return
    line, omissions = build_curl_line(detail, url)
    out.print(f"\n{to_printable(line)}", soft_wrap=True)
    for omission in omissions:
        out.print(style_text(f"without {omission}", "dim"))
    if detail.differences:
        out.print()
        out.print(build_differences_table(detail.differences))
    out.print()
    out.print(render_answers(detail.captures, out.width, full=full))
    out.print()
    effects_table = build_effects_table(detail.captures)
    if effects_table is not None:
        out.print(effects_table)
        out.print()
    out.print(build_timeline_table(detail.captures, out.width))


def _build_pair_grid(detail: api.PairDetail) -> Table:
    pair = detail.pair
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("pair", to_printable(pair.id))
    grid.add_row("service", to_printable(pair.endpoint.service))
    grid.add_row("request", to_printable(f"{pair.endpoint.method} {pair.request}"))
    grid.add_row("time", format_local_time(pair.time))
    for version, release in ((common.VERSION_OLD, pair.old_release), (common.VERSION_NEW, pair.new_release)):
        release_text = f", release {to_printable(release)}" if release else ""
        grid.add_row(version_name(version), summarise_answer(detail, version) + release_text)
    grid.add_row(
        "user got", f"{version_name(pair.live)}'s response" if pair.live else "unknown: the capture is missing"
    )
    if pair.finding_ids:
        grid.add_row("findings", ", ".join(map(str, pair.finding_ids)))
    if pair.explained:
        rules_text = ", ".join(
            f"{explanation.finding_id} by rule {explanation.rule_id}" for explanation in pair.explained
        )
        grid.add_row("explained", f"{rules_text} (abreast rules list)")
    if pair.drift_finding_ids:
        grid.add_row("drift", ", ".join(map(str, pair.drift_finding_ids)))
    if pair.reason:
        grid.add_row("reason", to_printable(pair.reason))
    return grid


def select_compared_capture(
    captures: Sequence[api.CaptureDetail], version: common.Version.ValueType
) -> api.CaptureDetail | None:
    """Return the first attempt of a version. Baseline copies don't count."""
    candidates = [c for c in captures if c.version == version and c.role != common.ROLE_BASELINE]
    return min(candidates, key=lambda capture: capture.attempt, default=None)


def render_answers(captures: Sequence[api.CaptureDetail], width: int, *, full: bool = False) -> RenderableType:
    old, new = (select_compared_capture(captures, version) for version in (common.VERSION_OLD, common.VERSION_NEW))
    rows = [
        LinePair(format_status_line(old), format_status_line(new)),
        *align_headers(old, new),
        LinePair("", ""),
        *align_lines(split_captured_body(old), split_captured_body(new)),
    ]
    if width >= MIN_SIDE_BY_SIDE_COLUMNS:
        return _render_side_by_side(rows, old, new, full=full)
    return _render_unified(rows, full=full)


def format_status_line(capture: api.CaptureDetail | None) -> str:
    if capture is None:
        return "(no capture)"
    if capture.status:
        return f"status {capture.status}"
    return format_exception(capture) or "no response"


def format_exception(capture: api.CaptureDetail | None) -> str:
    if capture is None or not capture.exception:
        return ""
    return f"raised {to_printable(capture.exception, MAX_EXCEPTION_NAME_CHARS)}"


def summarise_answer(detail: api.PairDetail, version: common.Version.ValueType) -> str:
    """Describe a version's response: `200 in 3.1 ms`, `raised KeyError in 2.0 ms`, `no capture`."""
    pair = detail.pair
    if version == common.VERSION_OLD:
        has_time, duration, status = pair.HasField("old_time"), pair.old_time, pair.old_status
    else:
        has_time, duration, status = pair.HasField("new_time"), pair.new_time, pair.new_status
    if not has_time:
        return "no capture"
    exception_text = format_exception(select_compared_capture(detail.captures, version))
    if status:
        return f"{status} in {format_duration(duration)}" + (f", then {exception_text}" if exception_text else "")
    return f"{exception_text or 'no response'} in {format_duration(duration)}"


def align_headers(old: api.CaptureDetail | None, new: api.CaptureDetail | None) -> list[LinePair]:
    """Align headers by name, and headers of the same name in their order."""
    rows_by_header: dict[tuple[str, int], list[str | None]] = {}
    for side, capture in enumerate((old, new)):
        occurrences: Counter[str] = Counter()
        for header in capture.headers if capture else ():
            row = rows_by_header.setdefault((header.name, occurrences[header.name]), [None, None])
            row[side] = to_printable(f"{header.name}: {header.value}")
            occurrences[header.name] += 1
    return [LinePair(*rows_by_header[key]) for key in sorted(rows_by_header)]


def split_captured_body(capture: api.CaptureDetail | None) -> list[str]:
    """Split a body into lines, JSON into one value per line."""
    if capture is None:
        return []
    try:
        text = capture.body.decode()
        lines = [to_printable(line) for line in split_json_lines(text) or text.splitlines()]
    except UnicodeDecodeError:
        lines = [f"({format_bytes(len(capture.body))} of binary data)"]
    missing_bytes = capture.body_length - len(capture.body)
    return [*lines, f"… {format_bytes(missing_bytes)} more were not captured"] if missing_bytes > 0 else lines


def align_lines(old: list[str], new: list[str]) -> list[LinePair]:
    """Align equal lines, and pair the lines between them."""
    if max(len(old), len(new)) > MAX_ALIGNED_LINES:
        return [LinePair(*sides) for sides in itertools.zip_longest(old, new)]
    rows = []
    for operation, i, end_i, j, end_j in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if operation == "equal":
            rows += [LinePair(line, line) for line in old[i:end_i]]
        else:
            rows += [LinePair(*sides) for sides in itertools.zip_longest(old[i:end_i], new[j:end_j])]
    return rows


def fold_equal_rows(rows: Sequence[LinePair], *, full: bool) -> Iterator[LinePair | int]:
    """Yield the rows, and the number of hidden rows in place of the middle of a long equal run."""
    position = 0
    for is_equal, run in itertools.groupby(rows, key=lambda row: row.is_equal):
        run_rows = list(run)
        before = CONTEXT_LINES if position else 0
        after = CONTEXT_LINES if position + len(run_rows) < len(rows) else 0
        position += len(run_rows)
        hidden_count = len(run_rows) - before - after
        if full or not is_equal or hidden_count < 2:
            yield from run_rows
        else:
            yield from run_rows[:before]
            yield hidden_count
            yield from run_rows[len(run_rows) - after :]


def _render_side_by_side(
    rows: Sequence[LinePair], old: api.CaptureDetail | None, new: api.CaptureDetail | None, *, full: bool
) -> Table:
    titles = [
        f"{version} ({role_name(capture.role)})" if capture else version
        for version, capture in (("old", old), ("new", new))
    ]
    table = make_table(titles[0], "", titles[1])
    table.columns[0].ratio = table.columns[2].ratio = 1
    table.expand = True
    for row in fold_equal_rows(rows, full=full):
        if isinstance(row, int):
            table.add_row(_format_hidden_lines(row), "", _format_hidden_lines(row))
        elif row.is_equal:
            table.add_row(row.old, "", row.new)
        else:
            table.add_row(Text(row.old or "", OLD_COLOUR), "≠", Text(row.new or "", NEW_COLOUR))
    return table


def _render_unified(rows: Sequence[LinePair], *, full: bool) -> Group:
    """Render as diff does: - is old, + is new."""
    lines: list[Text] = []
    for row in fold_equal_rows(rows, full=full):
        if isinstance(row, int):
            lines.append(Text("  ").append_text(_format_hidden_lines(row)))
        elif row.is_equal:
            lines.append(Text(f"  {row.old}"))
        else:
            lines += [Text(f"- {row.old}", OLD_COLOUR)] if row.old is not None else []
            lines += [Text(f"+ {row.new}", NEW_COLOUR)] if row.new is not None else []
    return Group(Text("- old", f"bold {OLD_COLOUR}"), Text("+ new", f"bold {NEW_COLOUR}"), *lines)


def _format_hidden_lines(line_count: int) -> Text:
    return Text(f"… {format_quantity(line_count, 'equal line')}", "dim")


def build_effects_table(captures: Sequence[api.CaptureDetail]) -> Table | None:
    """Build a table with one row per effect, in the order of each capture. Return None if there are no effects."""
    table = make_table("", "effect", "at", "payload", "", numeric_columns=frozenset({"at"}))
    for capture in captures:
        version = version_name(capture.version)
        source = Text(f"{version} {role_name(capture.role)}", STYLE_BY_WORD.get(version, ""))
        for effect in capture.effects:
            table.add_row(
                source,
                to_printable(f"{effect.kind}[{effect.key}]" if effect.key else effect.kind),
                "+" + format_seconds(effect.start.ToNanoseconds() / 1e9),
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


def build_timeline_spans(captures: Sequence[api.CaptureDetail]) -> list[TimelineSpan]:
    """Build one span per capture, by arrival. The clocks of two machines may differ by more than the bars show."""
    arrivals = [capture.start_time.ToNanoseconds() / 1e9 for capture in captures]
    first_arrival = min(arrivals, default=0.0)
    spans = (
        _build_capture_span(capture, arrival - first_arrival)
        for capture, arrival in zip(captures, arrivals, strict=True)
    )
    return sorted(spans, key=lambda span: span.arrival)


def _build_capture_span(capture: api.CaptureDetail, arrival: float) -> TimelineSpan:
    first_byte = arrival + capture.first_byte.ToNanoseconds() / 1e9 if capture.HasField("first_byte") else None
    version = version_name(capture.version)
    attempt = f" {capture.attempt}" if capture.attempt > 1 else ""
    notes = [f"raised {capture.exception}"] if capture.exception else []
    if capture.client_left:
        notes.append("the client left")
    if capture.spans and capture.role != common.ROLE_LIVE:
        notes.append("dropped by Envoy")
    return TimelineSpan(
        name=f"{version} {role_name(capture.role)}{attempt}",
        style=STYLE_BY_WORD.get(version, ""),
        arrival=arrival,
        first_byte=first_byte,
        end=max(arrival + capture.total.ToNanoseconds() / 1e9, first_byte or arrival),
        note=", ".join(notes),
        children=tuple(
            sorted((_build_child_span(child, arrival) for child in capture.spans), key=lambda span: span.arrival)
        ),
    )


def _build_child_span(child: api.Span, arrival: float) -> TimelineSpan:
    start = arrival + child.start.ToNanoseconds() / 1e9
    end = start + child.duration.ToNanoseconds() / 1e9
    return TimelineSpan(f"→ {child.kind} {child.name}"[:MAX_SPAN_NAME_CHARS], "dim", start, None, end, child.note)


def build_timeline_table(captures: Sequence[api.CaptureDetail], width: int) -> Table:
    """Build a table with one row per capture and per span in it: arrival, first byte, end, and a bar."""
    rows = [row for span in build_timeline_spans(captures) for row in (span, *span.children)]
    total_s = max((span.end for span in rows), default=0.0)
    note_columns = max((len(span.note) for span in rows), default=0)
    extra_name_columns = max((len(span.name) - USUAL_NAME_CHARS for span in rows), default=0)
    bar_columns = max(
        MIN_BAR_COLUMNS, min(MAX_BAR_COLUMNS, width - TIMELINE_TEXT_COLUMNS - note_columns - max(0, extra_name_columns))
    )
    table = make_table(
        "", "arrived", "first byte", "end", "", "", numeric_columns=frozenset({"arrived", "first byte", "end"})
    )
    table.columns[BAR_COLUMN_INDEX].no_wrap = True  # a narrow terminal wraps the notes instead
    for span in rows:
        first_byte_text = "-" if span.first_byte is None else format_seconds(span.first_byte)
        table.add_row(
            Text(to_printable(span.name), span.style),
            "+" + format_seconds(span.arrival),
            first_byte_text,
            format_seconds(span.end),
            draw_bar(span, total_s, bar_columns),
            to_printable(span.note),
        )
    return table


def draw_bar(span: TimelineSpan, total_s: float, columns: int) -> Text:
    """Draw the wait for the first byte, then the sending, in proportion to `total_s` and at least one column wide."""

    def to_column(moment: float) -> int:
        return min(columns - 1, int(moment / total_s * columns)) if total_s else 0

    start, end = to_column(span.arrival), to_column(span.end) + 1
    first_byte_column = end if span.first_byte is None else min(to_column(span.first_byte), end - 1)
    return Text(
        " " * start + WAITING_MARK * (first_byte_column - start) + SENDING_MARK * (end - first_byte_column), span.style
    )


def build_curl_line(detail: api.PairDetail, url: str = "") -> tuple[str, list[str]]:
    """Return a curl command that repeats the request, and descriptions of the parts that it omits."""
    omissions: list[str] = []
    target, method = detail.pair.request, detail.pair.endpoint.method
    body = _body_arguments(detail, omissions)
    arguments = ["curl", "-i"]
    if any(mark in target for mark in "[]{}"):
        arguments.append("-g")  # curl would expand the brackets
    if "/." in target:
        arguments.append("--path-as-is")  # curl would shorten the path
    if method == "HEAD":
        arguments.append("--head")
    elif method != ("POST" if body else "GET"):
        arguments += ["-X", shlex.quote(method)]
    for header in detail.request_headers:
        arguments += _header_arguments(header.name, header.value, omissions)
    if body and all(header.name != "content-type" for header in detail.request_headers):
        arguments += ["-H", "'content-type:'"]  # curl would add its default content type
    arguments += body
    arguments.append((shlex.quote(url.rstrip("/")) if url else URL_PLACEHOLDER) + _quote_bytes(target.encode()))
    return " ".join(arguments), omissions


def _header_arguments(name: str, value: str, omissions: list[str]) -> list[str]:
    if name in CURL_OWN_HEADERS:
        return []
    if HASH_PREFIX in value:
        omissions.append(f"its {name} (a secret; only its hash is stored)")
        return []
    if not (value.isascii() and value.isprintable()):
        omissions.append(f"its {name} (contains characters that the line can't hold; see --json)")
        return []
    return ["-H", shlex.quote(f"{name}: {value}" if value else f"{name};")]


def _body_arguments(detail: api.PairDetail, omissions: list[str]) -> list[str]:
    body = detail.request_body
    if not body:
        return []
    if len(body) > MAX_CURL_BODY_BYTES or b"\0" in body or detail.pair.endpoint.method == "HEAD":
        omissions.append(f"its body ({len(body)} bytes; see --json)")
        return []
    return ["--data-raw", _quote_bytes(body)]


def _quote_bytes(value: bytes) -> str:
    """Quote printable text for the shell, and write all other values byte by byte."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and (text or not value):
        return shlex.quote(text)
    return "$'" + "".join(chr(byte) if byte in UNESCAPED_BYTES else f"\\x{byte:02x}" for byte in value) + "'"
