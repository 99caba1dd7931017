"""`abreast pairs` and `abreast pair`: compared requests, and both responses of one."""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abreast.protocol.capture import HASH_PREFIX
from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.options import (
    PrintingClient,
    api_options,
    endpoint_options,
    enum_type,
    limit_option,
    service_option,
    window_options,
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
    make_grid,
    make_table,
    outcome_name,
    print_list,
    role_name,
    split_json_lines,
    style_text,
    to_printable,
    version_name,
)
from abreast_sidecar.compare.content import GRPC_TYPE

HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # curl reads `@name` from a file
URL_PLACEHOLDER = '"$URL"'  # only the reader knows which address to use
CURL_OWN_HEADERS = {"content-length", "connection", "transfer-encoding", "x-request-id"}
GRPC_OWN_HEADERS = {"content-type", "host", "te", "user-agent"}
CURL_DEFAULT_HEADERS = ("accept", "user-agent")
MAX_CURL_BODY_BYTES = 4000  # a longer body does not fit on a line
MAX_CURL_TARGET_CHARS = 8000
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


@click.command()
@service_option
@endpoint_options
@click.option(
    "--outcome", "outcomes", multiple=True, type=enum_type(common.Outcome), help="Only this outcome (repeatable)."
)
@click.option("--finding", "finding_id", type=click.IntRange(min=1), help="Only pairs that show this finding.")
@window_options
@limit_option
@api_options
def pairs_command(link: PrintingClient, limit: int, **filters: Any) -> None:
    """List the compared requests with their outcomes and findings, newest first.

    For both responses of one request, use `abreast pair ID`.
    """
    request = api.ListPairsRequest(**filters)
    link.show_rows(lambda calls: calls.comparison.ListPairs, request, limit, print_pairs)


def print_pairs(out: Console, response: api.ListPairsResponse) -> None:
    table = make_table("time", "outcome", "request", "old", "new", "user got", "findings", "pair")
    for pair in response.pairs:
        table.add_row(
            format_local_time(pair.time),
            style_text(outcome_name(pair.outcome)),
            to_printable(f"{pair.endpoint.method} {pair.request}", 120),
            str(pair.old_status or "-"),
            str(pair.new_status or "-"),
            version_name(pair.live) if pair.live else "-",
            ", ".join(map(str, pair.finding_ids)) or "-",
            to_printable(pair.id),
        )
    empty = "no stored pair matches (for the number of pairs by outcome: abreast status)"
    print_list(out, response, response.pairs, table, empty=empty, item="pair")


@click.command()
@click.argument("id")
@click.option("--full", is_flag=True, help="Include equal lines.")
@click.option("--url", default="", help="Address for the curl line, such as http://127.0.0.1:8002.")
@api_options
def pair_command(link: PrintingClient, id: str, full: bool, url: str) -> None:  # noqa: A002  # the argument's name
    """Show one request: both responses, the differences, the effects and a timeline.

    ID is the value of the response header x-abreast-pair. `abreast pairs` and `abreast finding` print ids too.
    """

    def print_text(out: Console, response: api.GetPairResponse) -> None:
        print_pair(out if out.is_terminal else make_console(PIPED_PAIR_COLUMNS), response.pair, full=full, url=url)

    link.show(lambda calls: calls.comparison.GetPair(api.GetPairRequest(id=id)), print_text)


def print_pair(out: Console, detail: api.PairDetail, *, full: bool = False, url: str = "") -> None:
    pair = detail.pair
    heading = style_text(outcome_name(pair.outcome))
    heading.append(f"  {endpoint_name(pair.endpoint)}")
    out.print(heading)
    out.print(_build_pair_grid(detail))
    out.print()
    if not detail.captures:
        out.print(
            "the responses of this pair are not stored: only some examples of each finding are (abreast findings)"
        )
        return
    print_curl_line(out, detail, url)
    if detail.differences:
        out.print()
        out.print(build_differences_table(detail.differences))
    effects_table = build_effects_table(detail.captures)
    for part in (
        render_responses(detail.captures, out.width, full=full),
        *([effects_table] if effects_table.row_count else []),
        build_timeline_table(detail.captures, out.width),
    ):
        out.print()
        out.print(part)


def _build_pair_grid(detail: api.PairDetail) -> Table:
    pair = detail.pair
    responses = []
    for version, release in ((common.VERSION_OLD, pair.old_release), (common.VERSION_NEW, pair.new_release)):
        release_text = f", release {to_printable(release)}" if release else ""
        responses.append((version_name(version), summarise_response(detail, version) + release_text))
    explanations = ", ".join(f"{item.finding_id} by rule {item.rule_id}" for item in pair.explained)
    return make_grid(
        [
            ("pair", to_printable(pair.id)),
            ("service", to_printable(pair.endpoint.service)),
            ("request", to_printable(f"{pair.endpoint.method} {pair.request}")),
            ("time", format_local_time(pair.time)),
            *responses,
            ("user got", f"{version_name(pair.live)}'s response" if pair.live else "unknown: the capture is missing"),
            ("findings", ", ".join(map(str, pair.finding_ids)) or None),
            ("explained", f"{explanations} (abreast rules list)" if explanations else None),
            ("drift", ", ".join(map(str, pair.drift_finding_ids)) or None),
            ("reason", to_printable(pair.reason) or None),
        ]
    )


def select_compared_capture(
    captures: Sequence[api.CaptureDetail], version: common.Version.ValueType
) -> api.CaptureDetail | None:
    """Return the first attempt of a version. Baseline copies don't count."""
    candidates = [c for c in captures if c.version == version and c.role != common.ROLE_BASELINE]
    return min(candidates, key=lambda capture: capture.attempt, default=None)


def render_responses(captures: Sequence[api.CaptureDetail], width: int, *, full: bool = False) -> RenderableType:
    """Render both responses side by side in a wide terminal, and as diff does in a narrow one."""
    old, new = (select_compared_capture(captures, version) for version in (common.VERSION_OLD, common.VERSION_NEW))
    rows = [
        LinePair(format_status_line(old), format_status_line(new)),
        *align_headers(old, new),
        LinePair("", ""),
        *align_lines(split_captured_body(old), split_captured_body(new)),
    ]
    folded_rows = fold_equal_rows(rows, full=full)
    if width < MIN_SIDE_BY_SIDE_COLUMNS:
        return _render_unified(folded_rows)
    old_title, new_title = (
        f"{version} ({role_name(capture.role)})" if capture else version
        for version, capture in (("old", old), ("new", new))
    )
    table = make_table(old_title, "", new_title)
    table.columns[0].ratio = table.columns[2].ratio = 1
    table.expand = True
    for row in folded_rows:
        if isinstance(row, int):
            table.add_row(_format_hidden_lines(row), "", _format_hidden_lines(row))
        elif row.is_equal:
            table.add_row(row.old, "", row.new)
        else:
            table.add_row(Text(row.old or "", OLD_COLOUR), "≠", Text(row.new or "", NEW_COLOUR))
    return table


def _render_unified(folded_rows: Iterable[LinePair | int]) -> Group:
    """Render as diff does: - is old, + is new."""
    lines: list[Text] = []
    for row in folded_rows:
        if isinstance(row, int):
            lines.append(Text("  ").append_text(_format_hidden_lines(row)))
        elif row.is_equal:
            lines.append(Text(f"  {row.old}"))
        else:
            lines += [Text(f"- {row.old}", OLD_COLOUR)] if row.old is not None else []
            lines += [Text(f"+ {row.new}", NEW_COLOUR)] if row.new is not None else []
    return Group(Text("- old", f"bold {OLD_COLOUR}"), Text("+ new", f"bold {NEW_COLOUR}"), *lines)


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


def summarise_response(detail: api.PairDetail, version: common.Version.ValueType) -> str:
    """Describe a version's response: `200 in 3.1 ms`, `raised KeyError in 2.0 ms`, `no capture`."""
    pair = detail.pair
    name = version_name(version)
    if not pair.HasField("old_time" if name == "old" else "new_time"):
        return "no capture"
    status, duration = getattr(pair, f"{name}_status"), format_duration(getattr(pair, f"{name}_time"))
    exception_text = format_exception(select_compared_capture(detail.captures, version))
    if status:
        return f"{status} in {duration}" + (f", then {exception_text}" if exception_text else "")
    return f"{exception_text or 'no response'} in {duration}"


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
    operations = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [
        LinePair(*sides)
        for _name, i, end_i, j, end_j in operations
        for sides in itertools.zip_longest(old[i:end_i], new[j:end_j])
    ]


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


def _format_hidden_lines(line_count: int) -> Text:
    return Text(f"… {format_quantity(line_count, 'equal line')}", "dim")


def build_effects_table(captures: Sequence[api.CaptureDetail]) -> Table:
    """Build a table with one row per effect, in the order of each capture."""
    table = make_table("", "effect", "at", "payload", "", numeric_columns={"at"})
    for capture in captures:
        version = version_name(capture.version)
        source = Text(f"{version} {role_name(capture.role)}", STYLE_BY_WORD.get(version, ""))
        for effect in capture.effects:
            note = "" if capture.role == common.ROLE_LIVE else "held back"
            if effect.note:
                note = "note"
            elif effect.error:
                note = f"raised {to_printable(effect.error)}"
            table.add_row(
                source,
                to_printable(f"{effect.kind}[{effect.key}]" if effect.key else effect.kind),
                "+" + format_seconds(effect.start.ToNanoseconds() / 1e9),
                to_printable(effect.payload, MAX_PAYLOAD_CHARS),
                note,
            )
        if capture.effects_dropped:
            table.add_row(source, f"and {capture.effects_dropped} more", "", "", "not recorded")
    return table


def build_timeline_spans(captures: Sequence[api.CaptureDetail]) -> Iterator[TimelineSpan]:
    """Yield one span per capture, by arrival, each before the spans of the request's own calls.

    The clocks of two machines may differ by more than the bars show.
    """
    sorted_captures = sorted(captures, key=lambda capture: capture.start_time.ToNanoseconds())
    for capture in sorted_captures:
        arrival = (capture.start_time.ToNanoseconds() - sorted_captures[0].start_time.ToNanoseconds()) / 1e9
        first_byte = arrival + capture.first_byte.ToNanoseconds() / 1e9 if capture.HasField("first_byte") else None
        version = version_name(capture.version)
        attempt = f" {capture.attempt}" if capture.attempt > 1 else ""
        notes = {
            f"raised {capture.exception}": capture.exception,
            "the client left": capture.client_left,
            "dropped by Envoy": capture.spans and capture.role != common.ROLE_LIVE,
        }
        yield TimelineSpan(
            name=f"{version} {role_name(capture.role)}{attempt}",
            style=STYLE_BY_WORD.get(version, ""),
            arrival=arrival,
            first_byte=first_byte,
            end=max(arrival + capture.total.ToNanoseconds() / 1e9, first_byte or arrival),
            note=", ".join(note for note, is_noted in notes.items() if is_noted),
        )
        for child in sorted(capture.spans, key=lambda child: child.start.ToNanoseconds()):
            start = arrival + child.start.ToNanoseconds() / 1e9
            end = start + child.duration.ToNanoseconds() / 1e9
            name = f"→ {child.kind} {child.name}"[:MAX_SPAN_NAME_CHARS]
            yield TimelineSpan(name, "dim", start, None, end, child.note)


def build_timeline_table(captures: Sequence[api.CaptureDetail], width: int) -> Table:
    """Build a table with one row per capture and per span in it: arrival, first byte, end, and a bar."""
    rows = list(build_timeline_spans(captures))
    total_s = max((span.end for span in rows), default=0.0)
    note_columns = max((len(span.note) for span in rows), default=0)
    extra_name_columns = max([0, *(len(span.name) - USUAL_NAME_CHARS for span in rows)])
    free_columns = width - TIMELINE_TEXT_COLUMNS - note_columns - extra_name_columns
    bar_columns = max(MIN_BAR_COLUMNS, min(MAX_BAR_COLUMNS, free_columns))
    numeric_columns = ("arrived", "first byte", "end")
    table = make_table("", *numeric_columns, "", "", numeric_columns=numeric_columns)
    table.columns[BAR_COLUMN_INDEX].no_wrap = True  # a narrow terminal wraps the notes instead
    for span in rows:
        table.add_row(
            Text(to_printable(span.name), span.style),
            "+" + format_seconds(span.arrival),
            "-" if span.first_byte is None else format_seconds(span.first_byte),
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
    waiting, sending = WAITING_MARK * (first_byte_column - start), SENDING_MARK * (end - first_byte_column)
    return Text(" " * start + waiting + sending, span.style)


def print_curl_line(out: Console, detail: api.PairDetail, url: str, indent: str = "") -> None:
    line, omissions = build_curl_line(detail, url)
    out.print(f"{indent}{to_printable(line)}", soft_wrap=True)  # one line, to be copied
    for omission in omissions:
        out.print(style_text(f"{indent}without {omission}", "dim"))


def format_curl_lines(detail: api.PairDetail) -> str:
    """Return the curl command, and a shell comment for each omission."""
    line, omissions = build_curl_line(detail)
    return "\n".join([to_printable(line), *(f"# without {to_printable(omission)}" for omission in omissions)])


def build_curl_line(detail: api.PairDetail, url: str = "") -> tuple[str, list[str]]:
    """Return a command that repeats the request, and descriptions of the parts that it omits."""
    is_grpc = any(row.name == "content-type" and row.value.startswith(GRPC_TYPE) for row in detail.request_headers)
    return _build_grpc_line(detail, url) if is_grpc else _build_http_line(detail, url)


def _build_http_line(detail: api.PairDetail, url: str) -> tuple[str, list[str]]:
    omissions: list[str] = []
    target, method = detail.request_target or detail.pair.request, detail.pair.endpoint.method
    body = _body_arguments(detail, omissions)
    names = {header.name for header in detail.request_headers} | {*detail.other_request_headers}
    arguments = ["curl", "-i"]
    if any(mark in target for mark in "[]{}"):
        arguments.append("-g")  # curl would expand the brackets
    if "/." in target:
        arguments.append("--path-as-is")  # curl would shorten the path
    if method == "HEAD":
        arguments.append("--head")
    elif method != ("POST" if body else "GET"):
        arguments += ["-X", shlex.quote(method)]
    if "accept-encoding" in names:
        arguments.append("--compressed")  # print the decoded body
    for header in detail.request_headers:
        arguments += _header_arguments(header.name, header.value, omissions)
    for name in (*CURL_DEFAULT_HEADERS, *(["content-type"] if body else [])):
        if name not in names:
            arguments += ["-H", f"'{name}:'"]  # curl would add its default
    if others := [name for name in detail.other_request_headers if name not in CURL_OWN_HEADERS]:
        omissions.append(f"its {', '.join(others)} (not captured: setting request_headers of the service)")
    arguments += body
    arguments.append((shlex.quote(url.rstrip("/")) if url else URL_PLACEHOLDER) + _quote_target(target, omissions))
    return " ".join(arguments), omissions


def _build_grpc_line(detail: api.PairDetail, url: str) -> tuple[str, list[str]]:
    """Return a command of buf, which has the options of curl and needs reflection or --schema."""
    omissions: list[str] = []
    arguments = ["buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    for header in detail.request_headers:
        if header.name not in GRPC_OWN_HEADERS and not header.name.startswith("grpc-"):
            arguments += _header_arguments(header.name, header.value, omissions)
    if body := _body_arguments(detail, omissions):
        arguments += ["--data", body[1]]
    target = _quote_target(detail.request_target or detail.pair.request, omissions)
    arguments.append((shlex.quote(url.rstrip("/")) if url else URL_PLACEHOLDER) + target)
    return " ".join(arguments), omissions


def _quote_target(target: str, omissions: list[str]) -> str:
    if not target.startswith("/"):  # appended to an address, it could name another host
        omissions.append("its target (no path; see --json)")
        target = "/"
    elif len(target) > MAX_CURL_TARGET_CHARS:
        omissions.append(f"the end of its target ({len(target):,} characters; see --json)")
        target = target[:MAX_CURL_TARGET_CHARS]
    if HASH_PREFIX in target:
        omissions.append("the secrets in its target (only their hashes are stored)")
    try:
        return _quote_bytes(target.encode("latin-1"))  # a capture has one character for each byte
    except UnicodeEncodeError:
        return _quote_bytes(target.encode())


def _header_arguments(name: str, value: str, omissions: list[str]) -> list[str]:
    if name in CURL_OWN_HEADERS:
        return []
    if HASH_PREFIX in value:
        omissions.append(f"its {name} (a secret; only its hash is stored)")
        return []
    if not (value.isascii() and value.isprintable() and HEADER_NAME.fullmatch(name)):
        omissions.append(f"its {name} (contains characters that the line can't hold; see --json)")
        return []
    return ["-H", shlex.quote(f"{name}: {value}" if value else f"{name};")]


def _body_arguments(detail: api.PairDetail, omissions: list[str]) -> list[str]:
    body, length = detail.request_body, max(detail.request_body_length, len(detail.request_body))
    if not length:
        return []
    if len(body) < length:
        omissions.append(f"its body ({length} bytes; only {len(body)} are captured)")
        return []
    if length > MAX_CURL_BODY_BYTES or b"\0" in body or detail.pair.endpoint.method == "HEAD":
        omissions.append(f"its body ({length} bytes; see --json)")
        return []
    if HASH_PREFIX.encode() in body:
        omissions.append("the secrets in its body (only their hashes are stored)")
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
