"""How rules look in a terminal."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.humane import count, counted, printable
from abreast_sidecar.cli.tables import endpoint_name, kind_name, styled, table, where

STATES = {
    api.RULE_STATE_IN_FORCE: "holds",
    api.RULE_STATE_EXPIRED: "expired",
    api.RULE_STATE_DELETED: "deleted",
}


def title(rule: api.Rule) -> str:
    return f"rule {rule.id} ({printable(rule.name)})"


def listing(rules: Iterable[api.Rule]) -> Table:
    made = table(
        "id", "state", "rule", "explains", "until", "owner", "reason", "from", right=frozenset({"id"})
    )
    for rule in rules:
        made.add_row(
            str(rule.id),
            _state(rule),
            printable(rule.name),
            explains(rule),
            f"{rule.expire_time.ToDatetime(dt.UTC):%Y-%m-%d}",
            printable(rule.owner),
            printable(rule.reason),
            printable(rule.source or rule.creator),
        )
    return made


def _state(rule: api.Rule) -> Text:
    state = STATES.get(rule.state, "")
    shown = state if rule.rejudged else f"{state}, judging what is stored"
    return styled(shown, "ok" if rule.state == api.RULE_STATE_IN_FORCE else "dim")


def explains(rule: api.Rule) -> str:
    """`12 pairs, 3 were judged before`."""
    if rule.state != api.RULE_STATE_IN_FORCE:
        return ""
    if rule.action == api.RULE_ACTION_WAIVE_COVERAGE:
        return "coverage, no pair"
    before = f", {count(rule.unknown)} judged before it" if rule.unknown else ""
    return f"{counted(rule.pairs, 'pair')}{before}"


def hidden(findings: Iterable[api.HiddenFinding]) -> Table:
    made = table("finding", "endpoint", "place", "kind", "hides", "", right=frozenset({"finding"}))
    for one in findings:
        made.add_row(
            str(one.finding_id),
            endpoint_name(one.endpoint),
            where(one.part, one.path),
            kind_name(one.kind),
            _hides(one),
            styled("somebody confirmed it", "warn") if one.confirmed else "",
        )
    return made


def _hides(one: api.HiddenFinding) -> str:
    if one.exact:
        return counted(one.pairs, "pair")
    tried = (
        f"{one.hidden_examples} of {counted(one.examples, 'kept example')}" if one.examples else "not known"
    )
    return f"{tried}; {counted(one.pairs, 'pair')} at most"


def plan(found: api.ApplyRulesResponse) -> str:
    lines = [f"+ {printable(rule.name)}" for rule in found.created]
    lines += [f"- {printable(rule.name)}" for rule in found.deleted]
    numbers = (("new", found.created), ("gone", found.deleted), ("unchanged", found.unchanged))
    return "\n".join([*lines, ", ".join(f"{len(rules)} {name}" for name, rules in numbers)])
