"""Both answers of a pair, side by side or one below the other, with what differs marked."""

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
    role_name,
    split_json_lines,
    style_text,
    to_printable,
    version_name,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, build_time_window, print_json, split_page_sizes

URL_PLACEHOLDER = '"$URL"'  # the reader's own: nobody but them knows which address may be asked
CURL_OWN_HEADERS = {"host", "content-length", "accept-encoding", "connection", "transfer-encoding", "x-request-id"}
MAX_CURL_BODY_BYTES = 4000  # bytes; a longer one does not fit on a line
UNESCAPED_BYTES = frozenset(range(32, 127)) - set(b"\\'")


def build_curl_line(detail: api.PairDetail, url: str = "") -> tuple[str, list[str]]:
    """The line, and what it lacks of the request."""
    omissions: list[str] = []
    target = detail.pair.request
    body = _body_arguments(detail, omissions)
    arguments = [
        "curl",
        "-i",
        *_path_arguments(target),
        *_method_arguments(detail.pair.endpoint.method, body=bool(body)),
    ]
    for header in detail.request_headers:
        arguments += _header_arguments(header.name, header.value, omissions)
    if body and all(header.name != "content-type" for header in detail.request_headers):
        arguments += ["-H", "'content-type:'"]  # or curl names one
    arguments += body
    arguments.append((shlex.quote(url.rstrip("/")) if url else URL_PLACEHOLDER) + _quote_bytes(target.encode()))
    return " ".join(arguments), omissions


def _path_arguments(target: str) -> list[str]:
    """curl would expand brackets and shorten dots."""
    arguments = ["-g"] if any(mark in target for mark in "[]{}") else []
    return [*arguments, "--path-as-is"] if "/." in target else arguments


def _method_arguments(method: str, *, body: bool) -> list[str]:
    if method == "HEAD":
        return ["--head"]
    return [] if method == ("POST" if body else "GET") else ["-X", shlex.quote(method)]


def _header_arguments(name: str, value: str, omissions: list[str]) -> list[str]:
    if name in CURL_OWN_HEADERS:
        return []
    if HASH_PREFIX in value:
        omissions.append(f"its {name} (a secret, kept as a hash only)")
        return []
    if not (value.isascii() and value.isprintable()):
        omissions.append(f"its {name} (characters that a line can't hold; see --json)")
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
    """In single quotes where all can be shown, else byte by byte."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and (text or not value):
        return shlex.quote(text)
    return "$'" + "".join(chr(byte) if byte in UNESCAPED_BYTES else f"\\x{byte:02x}" for byte in value) + "'"


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


MIN_SIDE_BY_SIDE_COLUMNS = 100  # columns
MAX_EXCEPTION_NAME_CHARS = 80  # characters of an exception's name
CONTEXT_LINES = 3  # equal lines around a difference
MAX_ALIGNED_LINES = 3000  # lines a side that are aligned; difflib would take seconds for more
OLD_COLOUR, NEW_COLOUR = "blue", "magenta"


@dataclass(frozen=True)
class LinePair:
    """A line of old beside its line of new; None where a side has none."""

    old: str | None
    new: str | None

    @property
    def is_equal(self) -> bool:
        return self.old == self.new


def select_compared_capture(
    captures: Sequence[api.CaptureDetail], version: common.Version.ValueType
) -> api.CaptureDetail | None:
    """The first attempt that is no baseline copy."""
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
    return format_exception(capture) or "no answer"


def format_exception(capture: api.CaptureDetail | None) -> str:
    return (
        f"raised {to_printable(capture.exception, MAX_EXCEPTION_NAME_CHARS)}" if capture and capture.exception else ""
    )


def summarise_answer(detail: api.PairDetail, version: common.Version.ValueType) -> str:
    """How a version answered, as far as is kept: `200 in 3.1 ms`, `raised KeyError in 2.0 ms`, `no capture`."""
    pair, old = detail.pair, version == common.VERSION_OLD
    time = "old_time" if old else "new_time"
    if not pair.HasField(time):  # type: ignore[arg-type]  # a field's name
        return "no capture"
    exception_text = format_exception(select_compared_capture(detail.captures, version))
    code = pair.old_status if old else pair.new_status
    duration_text = f" in {format_duration(getattr(pair, time))}"
    if code:
        return f"{code}{duration_text}" + (f", then {exception_text}" if exception_text else "")
    return f"{exception_text or 'no answer'}{duration_text}"


def align_headers(old: api.CaptureDetail | None, new: api.CaptureDetail | None) -> list[LinePair]:
    """By name; headers that occur several times in their order."""
    rows_by_header: dict[tuple[str, int], list[str | None]] = {}
    for side, capture in enumerate((old, new)):
        occurrences: Counter[str] = Counter()
        for header in capture.headers if capture else ():
            row = rows_by_header.setdefault((header.name, occurrences[header.name]), [None, None])
            row[side] = to_printable(f"{header.name}: {header.value}")
            occurrences[header.name] += 1
    return [LinePair(*rows_by_header[key]) for key in sorted(rows_by_header)]


def split_captured_body(capture: api.CaptureDetail | None) -> list[str]:
    """JSON one value a line."""
    if capture is None:
        return []
    missing_bytes = capture.body_length - len(capture.body)
    truncation_note = [f"… {format_bytes(missing_bytes)} more were not captured"] if missing_bytes > 0 else []
    return [*split_body_bytes(capture.body), *truncation_note]


def split_body_bytes(body: bytes) -> list[str]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return [f"({format_bytes(len(body))} that are no text)"]
    lines = split_json_lines(text) or text.splitlines()
    return [to_printable(line) for line in lines]


def align_lines(old: list[str], new: list[str]) -> list[LinePair]:
    """Equal lines beside each other, in both orders."""
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
    """The rows, long runs of equal ones replaced by how many they are."""
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
    answers_table = make_table(_format_column_title("old", old), "", _format_column_title("new", new))
    answers_table.columns[0].ratio = answers_table.columns[2].ratio = 1
    answers_table.expand = True
    for row in fold_equal_rows(rows, full=full):
        if isinstance(row, int):
            answers_table.add_row(Text(_format_hidden_lines(row), "dim"), "", Text(_format_hidden_lines(row), "dim"))
        elif row.is_equal:
            answers_table.add_row(row.old, "", row.new)
        else:
            answers_table.add_row(Text(row.old or "", OLD_COLOUR), "≠", Text(row.new or "", NEW_COLOUR))
    return answers_table


def _render_unified(rows: Sequence[LinePair], *, full: bool) -> Group:
    """As diff prints it: - is old, + is new."""
    lines: list[Text] = []
    for row in fold_equal_rows(rows, full=full):
        if isinstance(row, int):
            lines.append(Text(f"  {_format_hidden_lines(row)}", "dim"))
        elif row.is_equal:
            lines.append(Text(f"  {row.old}"))
        else:
            lines += [Text(f"- {row.old}", OLD_COLOUR)] if row.old is not None else []
            lines += [Text(f"+ {row.new}", NEW_COLOUR)] if row.new is not None else []
    return Group(Text("- old", f"bold {OLD_COLOUR}"), Text("+ new", f"bold {NEW_COLOUR}"), *lines)


def _format_column_title(version: str, capture: api.CaptureDetail | None) -> str:
    return f"{version} ({role_name(capture.role)})" if capture else version


def _format_hidden_lines(line_count: int) -> str:
    return f"… {format_quantity(line_count, 'equal line')}"


PIPED_PAIR_COLUMNS = 120  # columns; both answers side by side


@click.command()
@click.argument("id")
@click.option("--full", is_flag=True, help="Equal lines too.")
@click.option("--url", default="", help="For the curl line: where to send the request, such as http://127.0.0.1:8002.")
@json_option
@connection_options
def pair_command(link: SidecarClient, id: str, full: bool, url: str, as_json: bool) -> None:  # noqa: A002  # the argument's name
    """One request: both answers, what differs, and when.

    ID is the answer's header x-abreast-pair, or one that `abreast finding` shows.
    """
    request = api.GetPairRequest(id=id)
    response = link.call(lambda calls: calls.comparison.GetPair(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        out = make_console()
        print_pair(out if out.is_terminal else make_console(PIPED_PAIR_COLUMNS), response.pair, full=full, url=url)


def print_pair(out: Console, detail: api.PairDetail, *, full: bool = False, url: str = "") -> None:
    pair = detail.pair
    heading = style_text(f"{outcome_name(pair.outcome)}", outcome_name(pair.outcome))
    heading.append(f"  {endpoint_name(pair.endpoint)}")
    out.print(heading)
    out.print(_build_pair_grid(detail))
    if not detail.captures:
        out.print("\nthe answers are not kept: only some examples of each finding are (abreast findings)")
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
    grid.add_row("old", _format_side(summarise_answer(detail, common.VERSION_OLD), pair.old_release))
    grid.add_row("new", _format_side(summarise_answer(detail, common.VERSION_NEW), pair.new_release))
    grid.add_row("user got", f"{version_name(pair.live)}'s answer" if pair.live else "unknown: that capture is missing")
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


def _format_side(answer_text: str, release: str) -> str:
    return answer_text + (f", release {to_printable(release)}" if release else "")


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, exactly, such as /products/{id}.")
@click.option(
    "--outcome", "outcomes", multiple=True, type=EnumParamType("OUTCOME"), help="Only this outcome; may be repeated."
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
    """Compared requests, newest first.

    Look at one with `abreast pair ID`.
    """
    request = api.ListPairsRequest(
        service=service,
        method=method.upper(),
        route=route,
        finding_id=finding or 0,
        window=build_time_window(since, until),
    )
    request.outcomes.extend(outcomes)
    response = link.call(lambda calls: _fetch_pairs(calls, request, limit))
    if as_json:
        print_json(response)
    else:
        print_pairs(make_console(), response)


async def _fetch_pairs(calls: Calls, request: api.ListPairsRequest, limit: int) -> api.ListPairsResponse:
    response = api.ListPairsResponse()
    for request.page_size in split_page_sizes(limit):
        page = await calls.comparison.ListPairs(request, timeout=calls.timeout_s)
        response.pairs.extend(page.pairs)
        request.page_token = response.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return response


def print_pairs(out: Console, response: api.ListPairsResponse) -> None:
    if not response.pairs:
        out.print("no such pair is kept (abreast status says how requests ended)")
        return
    out.print(build_pairs_table(response))
    if out.is_terminal:
        more_text = "; there are more: raise --limit, or filter" if response.next_page_token else ""
        first_id = response.pairs[0].id
        out.print(
            f"\n{format_quantity(len(response.pairs), 'pair')}{more_text}. Look at one: abreast pair {first_id}",
            style="dim",
        )


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


MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 16, 60  # columns of the bars
WAITING_MARK, SENDING_MARK = "─", "█"
TIMELINE_TEXT_COLUMNS = 52  # columns beside the bars and the notes


BAR_COLUMN_INDEX = 4  # the column they are in


USUAL_NAME_CHARS = 14  # characters, as `old baseline 2`


MAX_SPAN_NAME_CHARS = 40  # characters of what was asked


@dataclass(frozen=True)
class TimelineSpan:
    """Seconds since the first arrival. `first_byte` is None where no answer began."""

    name: str
    style: str
    arrival: float
    first_byte: float | None
    end: float
    note: str = ""
    children: tuple[TimelineSpan, ...] = ()  # what it asked of others, by the time it asked


def build_timeline_spans(captures: Sequence[api.CaptureDetail]) -> list[TimelineSpan]:
    """Ordered by arrival. The clocks of two machines may differ by more than the bars show."""
    arrivals = [capture.start_time.ToNanoseconds() / 1e9 for capture in captures]
    first_arrival = min(arrivals, default=0.0)
    timeline_spans = [
        _build_capture_span(capture, arrival - first_arrival)
        for capture, arrival in zip(captures, arrivals, strict=True)
    ]
    return sorted(timeline_spans, key=lambda span: span.arrival)


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
            sorted((_build_child_span(hop, arrival) for hop in capture.spans), key=lambda span: span.arrival)
        ),
    )


def _build_child_span(child: api.Span, arrival: float) -> TimelineSpan:
    start = arrival + child.start.ToNanoseconds() / 1e9
    end = start + child.duration.ToNanoseconds() / 1e9
    return TimelineSpan(f"→ {child.kind} {child.name}"[:MAX_SPAN_NAME_CHARS], "dim", start, None, end, child.note)


def build_timeline_table(captures: Sequence[api.CaptureDetail], width: int) -> Table:
    """One row a capture, and one for each thing it asked of others: arrival, first byte and end, and a bar of both."""
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
    table.columns[BAR_COLUMN_INDEX].no_wrap = True  # notes wrap, where all is too narrow
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
    """Waiting for the first byte, then sending; each as wide as its share of the whole, and never invisible."""

    def to_column(moment: float) -> int:
        return min(columns - 1, int(moment / total_s * columns)) if total_s else 0

    start, end = to_column(span.arrival), to_column(span.end) + 1
    first_byte_column = end if span.first_byte is None else min(to_column(span.first_byte), end - 1)
    return Text(
        " " * start + WAITING_MARK * (first_byte_column - start) + SENDING_MARK * (end - first_byte_column), span.style
    )
