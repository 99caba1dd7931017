"""`abreast report`: the verdict with its evidence as two files."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import click

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import SidecarClient, connection_options
from abreast_sidecar.cli.evidence import ReportEvidence, collect_evidence
from abreast_sidecar.cli.report_page import render_html_report
from abreast_sidecar.cli.verdict import verdict_options
from abreast_sidecar.errors import SettingError

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
    from abreast_sidecar.cli.connection import message_to_json

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
