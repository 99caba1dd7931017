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
from abreast_sidecar.cli.curl import build_curl_line
from abreast_sidecar.cli.evidence import ReportEvidence
from abreast_sidecar.cli.explanations import format_cause, format_explanation
from abreast_sidecar.cli.finding import format_feature, format_releases
from abreast_sidecar.cli.findings import format_difference
from abreast_sidecar.cli.humane import format_count, format_duration, format_percent, to_printable
from abreast_sidecar.cli.statuses import status_name
from abreast_sidecar.cli.tables import (
    MAX_TABLE_VALUE_CHARS,
    endpoint_name,
    format_location,
    impact_name,
    kind_name,
    outcome_name,
)
from abreast_sidecar.cli.verdict import format_pairs_to_pass

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
