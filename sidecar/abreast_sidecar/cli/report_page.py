"""The report as one HTML file. All that came from requests and answers is escaped, and can't steer the page."""

from __future__ import annotations

import datetime as dt
from functools import cache
from importlib.metadata import version
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2
from abreast_sidecar.cli.curl import curl
from abreast_sidecar.cli.evidence import Collected
from abreast_sidecar.cli.explanations import cause, why
from abreast_sidecar.cli.finding import feature, releases
from abreast_sidecar.cli.findings import difference
from abreast_sidecar.cli.humane import count, duration, percent, printable
from abreast_sidecar.cli.statuses import status_name
from abreast_sidecar.cli.tables import (
    LONGEST_VALUE,
    endpoint_name,
    impact_name,
    kind_name,
    outcome_name,
    where,
)
from abreast_sidecar.cli.verdict import to_pass

MOST_WAIVED = 1000  # rows shown; the JSON file has all
MOST_PLACES = 5  # of a finding, in its example
MEANING = {
    "PASS": "All that was tested is surely within the budget.",
    "FAIL": "Something is surely beyond the budget.",
    "INCONCLUSIVE": "Too little is known to let the new version take over, or to say that it must not.",
}


def page(found: Collected, now: dt.datetime) -> str:
    template = _environment().get_template("report.html.j2")
    doubtful = [one for one in found.verdict.endpoints if one.state != api.VERDICT_STATE_PASS]
    by_endpoint = {endpoint_name(one.endpoint): one for one in found.verdict.endpoints}
    return template.render(
        found=found,
        now=now,
        version=version("abreast"),
        meaning=MEANING,
        doubtful=doubtful,
        by_endpoint=by_endpoint,
        most_waived=MOST_WAIVED,
        most_places=MOST_PLACES,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        clean=printable,
        number=count,
        percent=percent,
        time=_time,
        endpoint=endpoint_name,
        state=_state,
        subject=_subject,
        outcome=lambda one: outcome_name(one.outcome),
        impact=lambda one: impact_name(one.impact),
        kind=lambda one: kind_name(one.kind),
        place=_place,
        status=lambda one: status_name(one.status),
        cause=cause,
        why=why,
        command=lambda one: curl(one)[0],
        shown_by=_shown_by,
        said=difference,
        releases=releases,
        feature=feature,
        to_pass=to_pass,
        value=lambda text: printable(text, LONGEST_VALUE),
        taken=_taken,
        covers=_covers,
    )
    return environment


def _time(moment: Timestamp) -> str:
    return f"{moment.ToDatetime(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _state(one: Any) -> str:
    return api.VerdictState.Name(one.state).removeprefix("VERDICT_STATE_")


def _subject(one: api.VerdictReason) -> str:
    return api.VerdictSubject.Name(one.subject).removeprefix("VERDICT_SUBJECT_").lower()


def _place(one: api.Finding | common.Difference) -> str:
    exact = one.place if isinstance(one, common.Difference) else ""
    return where(one.part, exact or one.path)


def _shown_by(example: api.PairDetail, finding: api.Finding) -> list[common.Difference]:
    """Where the example shows the finding."""
    mine = (finding.part, finding.path, finding.kind)
    return [one for one in example.differences if (one.part, one.path, one.kind) == mine]


def _covers(one: rule_pb2.Rule) -> str:
    """What the rule says, as a person would write it."""
    action = rule_pb2.RuleAction.Name(one.action).removeprefix("RULE_ACTION_").lower().replace("_", "-")
    fields = ("path", "header", "status", "endpoint", "release", "by")
    said = [f"{name} {getattr(one, name)}" for name in fields if getattr(one, name)]
    return printable(" ".join([action, *said]))


def _taken(one: api.EndpointSummary, field: str) -> str:
    return duration(getattr(one, field)) if one.HasField(field) else "-"  # type: ignore[arg-type]  # names of fields
