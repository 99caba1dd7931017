"""`abreast report`: the verdict with its evidence as two files."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import click

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import Link, connected
from abreast_sidecar.cli.evidence import Collected, collect
from abreast_sidecar.cli.report_page import page
from abreast_sidecar.cli.verdict import asking
from abreast_sidecar.errors import SettingError

FORMAT = 1  # of the JSON file


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
@asking
@connected
def command(link: Link, request: api.GetVerdictRequest, output: Path, examples: int) -> None:
    """The verdict with its evidence as two files, for a change ticket.

    One HTML file that needs nothing else, and one JSON file with the same.
    """
    now = dt.datetime.now(dt.UTC)
    found = link.run(lambda calls: collect(calls, request, examples))
    write(output, ".json", json.dumps(for_machines(found, now), indent=2, ensure_ascii=True) + "\n")
    write(output, ".html", page(found, now))


def write(output: Path, suffix: str, content: str) -> None:
    """At once: half a report is none."""
    target = output.with_name(output.name + suffix)
    draft = output.with_name(f".{output.name}{suffix}.part")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise SettingError(f"{target} can't be written, choose another --output: {error.strerror}") from error
    click.echo(str(target))


def for_machines(found: Collected, now: dt.datetime) -> dict[str, Any]:
    from abreast_sidecar.cli.connection import as_text

    def plain(message: Any) -> Any:
        return json.loads(as_text(message, indent=None))

    return {
        "format": FORMAT,
        "written": now.isoformat(timespec="seconds"),
        "verdict": plain(found.verdict),
        "window": plain(found.request.window),
        "summary": plain(found.summary),
        "traffic": plain(found.traffic),
        "endpoints": [plain(one) for one in found.endpoints],
        "findings": [plain(one) for one in found.findings],
        "waived": [plain(one) for one in found.waived],
        "rules": [plain(one) for one in found.rules],
        "examples": {
            str(number): plain(one.examples[0]) for number, one in found.details.items() if one.examples
        },
        "features": {
            str(number): plain(one.feature)
            for number, one in found.details.items()
            if one.HasField("feature")
        },
        "traffic_events": [plain(one) for one in found.events],
    }
