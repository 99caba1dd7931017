"""How rules look in a terminal."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.humane import format_count, format_quantity, to_printable
from abreast_sidecar.cli.tables import endpoint_name, format_location, kind_name, make_table, style_text

RULE_STATE_NAMES = {
    api.RULE_STATE_IN_FORCE: "holds",
    api.RULE_STATE_EXPIRED: "expired",
    api.RULE_STATE_DELETED: "deleted",
}


def format_rule_title(rule: api.Rule) -> str:
    return f"rule {rule.id} ({to_printable(rule.name)})"


def build_rules_table(rules: Iterable[api.Rule]) -> Table:
    table = make_table(
        "id",
        "state",
        "rule",
        "explains",
        "until",
        "owner",
        "reason",
        "from",
        numeric_columns=frozenset({"id"}),
    )
    for rule in rules:
        table.add_row(
            str(rule.id),
            _format_rule_state(rule),
            to_printable(rule.name),
            format_explained_pairs(rule),
            f"{rule.expire_time.ToDatetime(dt.UTC):%Y-%m-%d}",
            to_printable(rule.owner),
            to_printable(rule.reason),
            to_printable(rule.source or rule.creator),
        )
    return table


def _format_rule_state(rule: api.Rule) -> Text:
    state = RULE_STATE_NAMES.get(rule.state, "")
    state_text = state if rule.rejudged else f"{state}, judging what is stored"
    return style_text(state_text, "ok" if rule.state == api.RULE_STATE_IN_FORCE else "dim")


def format_explained_pairs(rule: api.Rule) -> str:
    """`12 pairs, 3 were judged before`."""
    if rule.state != api.RULE_STATE_IN_FORCE:
        return ""
    if rule.action == api.RULE_ACTION_WAIVE_COVERAGE:
        return "coverage, no pair"
    unknown_text = f", {format_count(rule.unknown)} judged before it" if rule.unknown else ""
    return f"{format_quantity(rule.pairs, 'pair')}{unknown_text}"


def build_hidden_findings_table(findings: Iterable[api.HiddenFinding]) -> Table:
    table = make_table(
        "finding", "endpoint", "place", "kind", "hides", "", numeric_columns=frozenset({"finding"})
    )
    for finding in findings:
        table.add_row(
            str(finding.finding_id),
            endpoint_name(finding.endpoint),
            format_location(finding.part, finding.path),
            kind_name(finding.kind),
            _format_hidden_pairs(finding),
            style_text("somebody confirmed it", "warn") if finding.confirmed else "",
        )
    return table


def _format_hidden_pairs(finding: api.HiddenFinding) -> str:
    if finding.exact:
        return format_quantity(finding.pairs, "pair")
    examples_text = (
        f"{finding.hidden_examples} of {format_quantity(finding.examples, 'kept example')}"
        if finding.examples
        else "not known"
    )
    return f"{examples_text}; {format_quantity(finding.pairs, 'pair')} at most"


def format_apply_plan(response: api.ApplyRulesResponse) -> str:
    lines = [f"+ {to_printable(rule.name)}" for rule in response.created]
    lines += [f"- {to_printable(rule.name)}" for rule in response.deleted]
    numbers = (("new", response.created), ("gone", response.deleted), ("unchanged", response.unchanged))
    return "\n".join([*lines, ", ".join(f"{len(rules)} {name}" for name, rules in numbers)])
