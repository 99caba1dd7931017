"""`abreast rules`: rules for known differences, and the files that hold them."""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import yaml
from rich.table import Table

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    SPAN_PATTERN,
    PrintingClient,
    actor_option,
    api_options,
    combine_options,
    connection_options,
    default_actor,
    limit_option,
    parse_span,
)
from abreast_sidecar.client.output import (
    Console,
    endpoint_name,
    format_count,
    format_location,
    format_quantity,
    kind_name,
    make_table,
    print_list,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import SidecarClient
from abreast_sidecar.compare.model import Kind
from abreast_sidecar.compare.rule_document import (
    RuleError,
    build_schema,
    dict_to_message,
    message_to_dict,
    parse_field,
    parse_rules,
    rule_to_dict,
)
from abreast_sidecar.compare.rules import ACTIONS, Rule
from abreast_sidecar.errors import ArgumentError

MAX_PREVIEW_ROWS = 5
RULE_STATE_NAMES = {
    api.RULE_STATE_IN_FORCE: "active",
    api.RULE_STATE_EXPIRED: "expired",
    api.RULE_STATE_DELETED: "deleted",
}
MAX_EXPORTED_RULES = 1000
RULE_PARTS = ("status", "header", "body", "error")
RULE_KINDS = tuple(kind for kind in get_args(Kind) if kind != "slower")

rule_options = combine_options(
    click.argument("action", type=click.Choice(ACTIONS)),
    click.option("--for", "finding_id", type=click.IntRange(min=1), default=None, help="Finding that the rule is for."),
    click.option("--path", default=None, help="Path and all below: $.items[*].price; .* any key, .** any steps."),
    click.option("--header", default=None, help="Response header; * matches any characters."),
    click.option("--part", type=click.Choice(RULE_PARTS), default=None, help="Only this part of a response."),
    click.option("--kind", type=click.Choice(RULE_KINDS), default=None, help="Only this kind of difference."),
    click.option("--endpoint", default=None, help='Only this endpoint, such as "GET /products/{id}"; * as in a shell.'),
    click.option("--status", default=None, help="Only this status, 404 or 4xx, or this change of it, 404->200."),
    click.option("--release", default=None, help="Only this release of new; * as in a shell."),
    click.option("--service", default=None, help="Only this service; * as in a shell."),
    click.option("--by", default=None, help="keyed-by: field that identifies an array element."),
    click.option("--absolute", type=click.FloatRange(min=0), default=None, help="tolerate: largest difference."),
    click.option("--relative", default=None, help="tolerate: largest difference as a share of old, 0.01 or 1%."),
    click.option("--old", default=None, help="expect: only this value of old, as JSON."),
    click.option("--new", default=None, help="expect: only this value of new, as JSON."),
)  # fmt: skip
force_option = click.option(
    "--force", is_flag=True, help="Accept a rule that covers more than its finding, or that hides a confirmed finding."
)
file_argument = click.argument("file", type=click.Path(path_type=Path))


def read_rules(file: Path) -> list[api.Rule]:
    """Read a YAML file of rules with owner, reason and expiry. Raise ArgumentError."""
    try:
        document = parse_rules(file.read_text(), str(file))
    except RuleError as error:
        raise ArgumentError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{file} can't be read as text: {getattr(error, 'strerror', error)}") from error
    return [_to_rule_message(rule, file) for rule in document.rules]


def _to_rule_message(rule: Rule, file: Path) -> api.Rule:
    missing_fields = [name for name in ("owner", "reason", "expires") if not getattr(rule, name)]
    if missing_fields:
        raise ArgumentError(f"{file}: rule {rule.name!r} needs {' and '.join(missing_fields)} to be imported")
    assert rule.expires is not None
    if rule.expires <= dt.datetime.now(dt.UTC).date():
        raise ArgumentError(f"{file}: rule {rule.name!r} expired on {rule.expires}; remove it, or set a later day")
    message = dict_to_message(rule_to_dict(rule), api.Rule())
    message.expire_time.FromDatetime(to_utc_midnight(rule.expires))
    return message


def to_utc_midnight(day: dt.date) -> dt.datetime:
    return dt.datetime.combine(day, dt.time(), dt.UTC)


def dump_rules_yaml(rules: Iterable[api.Rule]) -> str:
    """Return the rules as a file. A time within a day becomes the next day, because a file contains only days."""
    entries: list[dict[str, object]] = []
    for rule in rules:
        if any(entry["name"] == rule.name for entry in entries):  # from another source
            rule.name = f"{rule.name} ({rule.id})"
        expires = rule.expire_time.ToDatetime(dt.UTC)
        day = expires.date() + dt.timedelta(days=expires > to_utc_midnight(expires.date()))
        entries.append({**message_to_dict(rule), "expires": day})
    return yaml.safe_dump({"rules": entries}, sort_keys=False, allow_unicode=True)


def build_rule_message(option_values: Mapping[str, Any], expires: str = "") -> api.Rule:
    fields = {name: value for name, value in option_values.items() if value is not None and name not in {"old", "new"}}
    if relative := fields.get("relative"):
        fields["relative"] = parse_relative_share(relative)
    rule = dict_to_message(fields, api.Rule())
    for name in ("old", "new"):
        if option_values.get(name) is not None:
            setattr(rule, name, option_values[name])
    if expires:
        rule.expire_time.FromDatetime(parse_expiry(expires))
    return rule


def parse_relative_share(text: str) -> float:
    try:
        return float(parse_field("relative", text if text.strip().endswith("%") else float(text)))
    except (RuleError, ValueError):
        raise click.BadParameter(f"must be a share such as 0.01 or 1%, got {text!r}", param_hint="--relative") from None


def parse_expiry(text: str) -> dt.datetime:
    try:
        if SPAN_PATTERN.fullmatch(text.strip()):
            return dt.datetime.now(dt.UTC) + parse_span(text)
        return to_utc_midnight(dt.date.fromisoformat(text.strip()))
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"must be a span such as 90d or 12w, or a day such as 2030-01-31, got {text!r}", param_hint="--expires"
        ) from None


def format_rule_title(rule: api.Rule) -> str:
    return f"rule {rule.id} ({to_printable(rule.name)})"


def format_explained_pairs(rule: api.Rule) -> str:
    """Return `12 pairs, 3 compared before it`."""
    if rule.state != api.RULE_STATE_IN_FORCE:
        return ""
    if rule.action == api.RULE_ACTION_WAIVE_COVERAGE:
        return "coverage only"
    unknown_text = f", {format_count(rule.undetermined_pairs)} compared before it" if rule.undetermined_pairs else ""
    return f"{format_quantity(rule.pairs, 'pair')}{unknown_text}"


def build_hidden_findings_table(findings: Iterable[api.HiddenFinding]) -> Table:
    table = make_table("finding", "endpoint", "location", "kind", "hides", "", numeric_columns={"finding"})
    for finding in findings:
        hidden_text = format_quantity(finding.pairs, "pair")
        if not finding.exact:
            examples = format_quantity(finding.examples, "stored example")
            examples_text = f"{finding.hidden_examples} of {examples}" if finding.examples else "unknown"
            hidden_text = f"{examples_text}; {hidden_text} at most"
        table.add_row(
            str(finding.finding_id),
            endpoint_name(finding.endpoint),
            format_location(finding.part, finding.path),
            kind_name(finding.kind),
            hidden_text,
            style_text("confirmed", "warn") if finding.confirmed else "",
        )
    return table


@click.group()
def rules_command() -> None:
    """Manage the rules for known differences."""


@rules_command.command("list")
@click.option("--source", default=None, help="Only rules of this source, such as a file's name.")
@click.option(
    "--finding", "finding_id", type=click.IntRange(min=1), default=None, help="Only rules that explain this finding."
)
@click.option("--deleted", is_flag=True, help="Include deleted rules.")
@limit_option
@api_options
def list_rules(link: PrintingClient, source: str | None, finding_id: int | None, deleted: bool, limit: int) -> None:
    """List active and expired rules with the differences that they explain."""
    request = api.ListRulesRequest(source=source, finding_id=finding_id or 0, include_deleted=deleted)
    link.show_rows(lambda calls: calls.rules.ListRules, request, limit, print_rules)


def print_rules(out: Console, response: api.ListRulesResponse) -> None:
    columns = ("id", "state", "rule", "explains", "expires", "owner", "reason", "source")
    table = make_table(*columns, numeric_columns={"id"})
    for rule in response.rules:
        state = RULE_STATE_NAMES.get(rule.state, "") + ("" if rule.reapplied else ", being applied to stored pairs")
        table.add_row(
            str(rule.id),
            style_text(state, "ok" if rule.state == api.RULE_STATE_IN_FORCE else "dim"),
            to_printable(rule.name),
            format_explained_pairs(rule),
            f"{rule.expire_time.ToDatetime(dt.UTC):%Y-%m-%d}",
            to_printable(rule.owner),
            to_printable(rule.reason),
            to_printable(rule.source or rule.creator),
        )
    print_list(out, response, response.rules, table, empty="no rules; to create one: abreast rules add")


@rules_command.command("add")
@rule_options
@click.option("--name", default="", help="Display name.  [default: derived from the rule]")
@click.option("--owner", required=True, help="Person or team that is responsible for the rule.")
@click.option("--reason", required=True, help="Explanation of the difference.")
@click.option(
    "--expires",
    required=True,
    help="Lifetime, such as 90d or 12w, or the first day without the rule, such as 2030-01-31.",
)
@force_option
@actor_option
@api_options
def add_rule(
    link: PrintingClient, finding_id: int | None, expires: str, force: bool, actor: str | None, **fields: Any
) -> None:
    """Create a rule.

    With --for, the rule takes its scope from the finding where you omit an option. The sidecar refuses a rule that
    covers more than the finding.
    """
    request = api.CreateRuleRequest(
        rule=build_rule_message(fields, expires), finding_id=finding_id or 0, force=force, actor=default_actor(actor)
    )

    def print_title(out: Console, response: api.CreateRuleResponse) -> None:
        out.print(f"{format_rule_title(response.rule)} is active, and is being applied to stored pairs")

    link.show(lambda calls: calls.rules.CreateRule(request), print_title)


@rules_command.command("preview")
@rule_options
@click.option("--all", "everything", is_flag=True, help="Print all findings and warnings, not only the gravest.")
@api_options
def preview_rule(link: PrintingClient, finding_id: int | None, everything: bool, **fields: Any) -> int:
    """Show the stored differences that a rule would hide.

    Exits with 1 if `abreast rules add` would refuse the rule.
    """
    request = api.PreviewRuleRequest(rule=build_rule_message(fields), finding_id=finding_id or 0)
    limit = None if everything else MAX_PREVIEW_ROWS
    response = link.show(lambda calls: calls.rules.PreviewRule(request), functools.partial(print_preview, limit=limit))
    return ExitCode.CHECK_FAILED if response.objections else ExitCode.OK


def _print_objections(out: Console, objections: Sequence[str], limit: int | None = None) -> None:
    for objection in objections[:limit]:
        out.print(style_text(f"warning: {to_printable(objection)}", "warn"))
    if more_count := len(objections) - len(objections[:limit]):
        out.print(style_text(f"and {format_quantity(more_count, 'more warning')}; for all: --all", "warn"))


def print_preview(out: Console, response: api.PreviewRuleResponse, *, limit: int | None = MAX_PREVIEW_ROWS) -> None:
    """Print the counts, and then the gravest warnings and findings, at most `limit` of each."""
    if response.findings:
        confirmed_count = sum(finding.confirmed for finding in response.findings)
        endpoint_count = len({endpoint_name(finding.endpoint) for finding in response.findings})
        out.print(
            f"the rule would hide {format_quantity(len(response.findings), 'finding')} at "
            f"{format_quantity(endpoint_count, 'endpoint')}, {format_count(confirmed_count)} of them confirmed"
        )
    _print_objections(out, response.objections, limit)
    if response.findings:
        out.print(build_hidden_findings_table(response.findings[:limit]))
        if more_count := len(response.findings) - len(response.findings[:limit]):
            out.print(f"and {format_quantity(more_count, 'more finding')}; for all: --all", style="dim")
    elif response.rule.action == api.RULE_ACTION_WAIVE_COVERAGE:
        out.print("the rule hides no differences; a verdict that it keeps from INCONCLUSIVE names it")
    else:
        out.print("the rule would hide no stored difference")


@rules_command.command("delete")
@click.argument("id", type=click.IntRange(min=1))
@actor_option
@api_options
def delete_rule(link: PrintingClient, id: int, actor: str | None) -> None:  # noqa: A002  # the argument's name
    """Delete a rule. The differences that it hid reappear within seconds."""
    request = api.DeleteRuleRequest(id=id, actor=default_actor(actor))

    def print_title(out: Console, response: api.DeleteRuleResponse) -> None:
        out.print(f"{format_rule_title(response.rule)} is deleted, and stored pairs are being evaluated without it")

    link.show(lambda calls: calls.rules.DeleteRule(request), print_title)


@rules_command.command("import")
@file_argument
@click.option("--source", default=None, help="Source of the rules.  [default: the file's name]")
@click.option("--dry-run", is_flag=True, help="Print the changes without making them.")
@force_option
@actor_option
@api_options
def import_rules(
    link: PrintingClient, file: Path, source: str | None, dry_run: bool, force: bool, actor: str | None
) -> int:
    """Replace the rules of a source with the rules of a file.

    With --dry-run, exits with 1 if the import would need --force.
    """
    request = api.ApplyRulesRequest(
        source=source or file.name, rules=read_rules(file), dry_run=dry_run, force=force, actor=default_actor(actor)
    )
    response = link.show(lambda calls: calls.rules.ApplyRules(request), print_apply_plan)
    return ExitCode.CHECK_FAILED if response.objections else ExitCode.OK


def print_apply_plan(out: Console, response: api.ApplyRulesResponse) -> None:
    _print_objections(out, response.objections)
    for sign, rules in (("+", response.created), ("-", response.deleted)):
        for rule in rules:
            out.print(f"{sign} {to_printable(rule.name)}")
    numbers = (("created", response.created), ("deleted", response.deleted), ("unchanged", response.unchanged))
    out.print(", ".join(f"{len(rules)} {name}" for name, rules in numbers))


@rules_command.command("export")
@click.option("--source", default=None, help="Only rules of this source.")
@connection_options
def export_rules(link: SidecarClient, source: str | None) -> None:
    """Print the active rules as a file."""
    request = api.ListRulesRequest(source=source)
    response = link.list_rows(lambda calls: calls.rules.ListRules, request, MAX_EXPORTED_RULES)
    click.echo(dump_rules_yaml([rule for rule in response.rules if rule.state == api.RULE_STATE_IN_FORCE]), nl=False)


@rules_command.command("check")
@file_argument
def check_rule_file(file: Path) -> None:
    """Check whether a file can be imported. This command needs no sidecar."""
    click.echo(f"{file}: {format_quantity(len(read_rules(file)), 'rule')}")


@rules_command.command("schema")
def print_rule_schema() -> None:
    """Print the JSON schema of a rule file, for editors."""
    click.echo(json.dumps(build_schema(), indent=2))
