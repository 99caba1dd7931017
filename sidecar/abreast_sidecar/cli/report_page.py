"""The report as one HTML file. All that came from requests and answers is escaped, and can't steer the page."""

from __future__ import annotations

import datetime as dt
from functools import cache
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2
from abreast_sidecar.cli.curl import curl
from abreast_sidecar.cli.evidence import Collected
from abreast_sidecar.cli.explanations import cause, why
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

MOST_WAIVED = 1000  # rows shown; the JSON file has all
MOST_DIFFERENCES = 20  # of an example


def page(found: Collected, now: dt.datetime) -> str:
    template = _environment().get_template("report.html.j2")
    return template.render(found=found, now=now, most_waived=MOST_WAIVED)


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
        differences=lambda one: one.differences[:MOST_DIFFERENCES],
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


def _covers(one: rule_pb2.Rule) -> str:
    """What the rule says, as a person would write it."""
    action = rule_pb2.RuleAction.Name(one.action).removeprefix("RULE_ACTION_").lower().replace("_", "-")
    fields = ("path", "header", "status", "endpoint", "release", "by")
    said = [f"{name} {getattr(one, name)}" for name in fields if getattr(one, name)]
    return printable(" ".join([action, *said]))


def _taken(one: api.EndpointSummary, field: str) -> str:
    return duration(getattr(one, field)) if one.HasField(field) else "-"  # type: ignore[arg-type]  # names of fields
