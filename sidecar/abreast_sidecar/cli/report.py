"""The report as one HTML file. All that came from requests and answers is escaped, and can't steer the page."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2
from abreast_sidecar.cli.findings import (
    ReportEvidence,
    collect_evidence,
    format_cause,
    format_difference,
    format_explanation,
    format_feature,
    format_releases,
    status_name,
)
from abreast_sidecar.cli.pairs import build_curl_line
from abreast_sidecar.cli.verdict import format_pairs_to_pass, verdict_options
from abreast_sidecar.client.output import (
    MAX_TABLE_VALUE_CHARS,
    STYLE_BY_WORD,
    endpoint_name,
    format_count,
    format_duration,
    format_location,
    format_percent,
    format_seconds,
    impact_name,
    kind_name,
    make_table,
    outcome_name,
    role_name,
    to_printable,
    version_name,
)
from abreast_sidecar.client.sidecar_client import SidecarClient, connection_options
from abreast_sidecar.errors import SettingError

MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 16, 60  # columns of the bars
TIMELINE_TEXT_COLUMNS = 52  # columns beside the bars and the notes
BAR_COLUMN_INDEX = 4  # the column they are in
WAITING_MARK, SENDING_MARK = "─", "█"
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
    arrivals = [capture.started.ToNanoseconds() / 1e9 for capture in captures]
    first_arrival = min(arrivals, default=0.0)
    timeline_spans = [
        _build_capture_span(capture, arrival - first_arrival)
        for capture, arrival in zip(captures, arrivals, strict=True)
    ]
    return sorted(timeline_spans, key=lambda span: span.arrival)


def _build_capture_span(capture: api.CaptureDetail, arrival: float) -> TimelineSpan:
    first_byte = (
        arrival + capture.first_byte.ToNanoseconds() / 1e9 if capture.HasField("first_byte") else None
    )
    version = version_name(capture.version)
    attempt = f" {capture.attempt}" if capture.attempt > 1 else ""
    notes = [f"raised {capture.raised}"] if capture.raised else []
    if capture.client_left:
        notes.append("the client left")
    if capture.hops and capture.role != common.ROLE_LIVE:
        notes.append("dropped by Envoy")
    return TimelineSpan(
        name=f"{version} {role_name(capture.role)}{attempt}",
        style=STYLE_BY_WORD.get(version, ""),
        arrival=arrival,
        first_byte=first_byte,
        end=max(arrival + capture.total.ToNanoseconds() / 1e9, first_byte or arrival),
        note=", ".join(notes),
        children=tuple(
            sorted((_build_child_span(hop, arrival) for hop in capture.hops), key=lambda span: span.arrival)
        ),
    )


def _build_child_span(child: api.Hop, arrival: float) -> TimelineSpan:
    start = arrival + child.start.ToNanoseconds() / 1e9
    end = start + child.duration.ToNanoseconds() / 1e9
    return TimelineSpan(
        f"→ {child.kind} {child.name}"[:MAX_SPAN_NAME_CHARS], "dim", start, None, end, child.note
    )


def build_timeline_table(captures: Sequence[api.CaptureDetail], width: int) -> Table:
    """One row a capture, and one for each thing it asked of others: arrival, first byte and end, and a bar of both."""
    rows = [row for span in build_timeline_spans(captures) for row in (span, *span.children)]
    total_s = max((span.end for span in rows), default=0.0)
    note_columns = max((len(span.note) for span in rows), default=0)
    extra_name_columns = max((len(span.name) - USUAL_NAME_CHARS for span in rows), default=0)
    bar_columns = max(
        MIN_BAR_COLUMNS,
        min(MAX_BAR_COLUMNS, width - TIMELINE_TEXT_COLUMNS - note_columns - max(0, extra_name_columns)),
    )
    table = make_table(
        "",
        "arrived",
        "first byte",
        "end",
        "",
        "",
        numeric_columns=frozenset({"arrived", "first byte", "end"}),
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
        " " * start + WAITING_MARK * (first_byte_column - start) + SENDING_MARK * (end - first_byte_column),
        span.style,
    )


MAX_WAIVED_ROWS = 1000  # rows shown; the JSON file has all
MAX_EXAMPLE_DIFFERENCES = 5  # of a finding, in its example
VERDICT_MEANINGS = {
    "PASS": "All that was tested is surely within the budget.",
    "FAIL": "Something is surely beyond the budget.",
    "INCONCLUSIVE": "Too little is known to let the new version take over, or to say that it must not.",
}


def render_html_report(evidence: ReportEvidence, written_at: dt.datetime) -> str:
    template = _build_template_environment().get_template("report.html.j2")
    undecided_endpoints = [
        endpoint for endpoint in evidence.verdict.endpoints if endpoint.state != api.VERDICT_STATE_PASS
    ]
    by_endpoint = {endpoint_name(endpoint.endpoint): endpoint for endpoint in evidence.verdict.endpoints}
    return template.render(
        found=evidence,
        now=written_at,
        version=version("abreast"),
        meaning=VERDICT_MEANINGS,
        doubtful=undecided_endpoints,
        by_endpoint=by_endpoint,
        most_waived=MAX_WAIVED_ROWS,
        most_places=MAX_EXAMPLE_DIFFERENCES,
    )


@cache
def _build_template_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        clean=to_printable,
        number=format_count,
        percent=format_percent,
        time=_format_utc_time,
        endpoint=endpoint_name,
        state=_format_verdict_state,
        subject=_format_reason_subject,
        outcome=lambda one: outcome_name(one.outcome),
        impact=lambda one: impact_name(one.impact),
        kind=lambda one: kind_name(one.kind),
        place=_format_item_location,
        status=lambda one: status_name(one.status),
        cause=format_cause,
        why=format_explanation,
        command=lambda one: build_curl_line(one)[0],
        shown_by=_select_finding_differences,
        said=format_difference,
        releases=format_releases,
        feature=format_feature,
        to_pass=format_pairs_to_pass,
        value=lambda text: to_printable(text, MAX_TABLE_VALUE_CHARS),
        taken=_format_endpoint_percentile,
        covers=_format_rule_scope,
    )
    return environment


def _format_utc_time(moment: Timestamp) -> str:
    return f"{moment.ToDatetime(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _format_verdict_state(verdict: Any) -> str:
    return api.VerdictState.Name(verdict.state).removeprefix("VERDICT_STATE_")


def _format_reason_subject(reason: api.VerdictReason) -> str:
    return api.VerdictSubject.Name(reason.subject).removeprefix("VERDICT_SUBJECT_").lower()


def _format_item_location(item: api.Finding | common.Difference) -> str:
    exact = item.place if isinstance(item, common.Difference) else ""
    return format_location(item.part, exact or item.path)


def _select_finding_differences(example: api.PairDetail, finding: api.Finding) -> list[common.Difference]:
    """Where the example shows the finding."""
    finding_key = (finding.part, finding.path, finding.kind)
    return [
        difference
        for difference in example.differences
        if (difference.part, difference.path, difference.kind) == finding_key
    ]


def _format_rule_scope(rule: rule_pb2.Rule) -> str:
    """What the rule says, as a person would write it."""
    action = rule_pb2.RuleAction.Name(rule.action).removeprefix("RULE_ACTION_").lower().replace("_", "-")
    fields = ("path", "header", "status", "endpoint", "release", "by")
    conditions = [f"{name} {getattr(rule, name)}" for name in fields if getattr(rule, name)]
    return to_printable(" ".join([action, *conditions]))


def _format_endpoint_percentile(endpoint: api.EndpointSummary, field: str) -> str:
    return format_duration(getattr(endpoint, field)) if endpoint.HasField(field) else "-"  # type: ignore[arg-type]  # names of fields


REPORT_FORMAT_VERSION = 1  # of the JSON file


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("abreast-report"),
    show_default=True,
    help="Where to write; .html and .json are added.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Findings that are shown with an example.",
)
@verdict_options
@connection_options
def report_command(link: SidecarClient, request: api.GetVerdictRequest, output: Path, examples: int) -> None:
    """The verdict with its evidence as two files, for a change ticket.

    One HTML file that needs nothing else, and one JSON file with the same.
    """
    written_at = dt.datetime.now(dt.UTC)
    evidence = link.call(lambda calls: collect_evidence(calls, request, examples))
    write_report_file(
        output,
        ".json",
        json.dumps(build_json_report(evidence, written_at), indent=2, ensure_ascii=True) + "\n",
    )
    write_report_file(output, ".html", render_html_report(evidence, written_at))


def write_report_file(output: Path, suffix: str, content: str) -> None:
    """At once: half a report is none."""
    target = output.with_name(output.name + suffix)
    draft = output.with_name(f".{output.name}{suffix}.part")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise SettingError(f"{target} can't be written, choose another --output: {error.strerror}") from error
    click.echo(str(target))


def build_json_report(evidence: ReportEvidence, written_at: dt.datetime) -> dict[str, Any]:
    from abreast_sidecar.client.sidecar_client import message_to_json

    def to_plain(message: Any) -> Any:
        return json.loads(message_to_json(message, indent=None))

    return {
        "format": REPORT_FORMAT_VERSION,
        "written": written_at.isoformat(timespec="seconds"),
        "verdict": to_plain(evidence.verdict),
        "window": to_plain(evidence.request.window),
        "summary": to_plain(evidence.summary),
        "traffic": to_plain(evidence.traffic),
        "endpoints": [to_plain(item) for item in evidence.endpoints],
        "findings": [to_plain(item) for item in evidence.findings],
        "waived": [to_plain(item) for item in evidence.waived],
        "rules": [to_plain(item) for item in evidence.rules],
        "examples": {
            str(number): to_plain(item.examples[0])
            for number, item in evidence.details.items()
            if item.examples
        },
        "features": {
            str(number): to_plain(item.feature)
            for number, item in evidence.details.items()
            if item.HasField("feature")
        },
        "traffic_events": [to_plain(item) for item in evidence.events],
    }
