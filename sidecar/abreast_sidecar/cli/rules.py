"""`abreast rules`: what is known about differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    SidecarClient,
    connection_options,
    json_option,
    print_json,
    split_page_sizes,
)
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.humane import format_quantity, to_printable
from abreast_sidecar.cli.parameters import limit_option
from abreast_sidecar.cli.rule_files import dump_rules_yaml, read_rules
from abreast_sidecar.cli.rule_options import build_rule_message, rule_action_argument, rule_options
from abreast_sidecar.cli.rule_tables import (
    build_hidden_findings_table,
    build_rules_table,
    format_apply_plan,
    format_rule_title,
)
from abreast_sidecar.cli.shift import actor_option, default_actor
from abreast_sidecar.cli.tables import make_console, style_text

force_option = click.option(
    "--force", is_flag=True, help="Also where it hides more than it is made for, or what somebody confirmed."
)
source_option = click.option(
    "--source", default=None, help="Whose rules these are.  [default: the file's name]"
)
file_argument = click.argument("file", type=click.Path(path_type=Path))


@click.group()
def rules_command() -> None:
    """What is known about differences: to be ignored, tolerated, expected."""


@rules_command.command("list")
@click.option("--source", default=None, help="Only rules of this source, such as a file's name.")
@click.option(
    "--finding", "finding_id", type=click.IntRange(min=1), default=None, help="Only those that explain it."
)
@click.option("--deleted", is_flag=True, help="Also rules that were deleted.")
@limit_option
@json_option
@connection_options
def list_rules(
    link: SidecarClient, source: str | None, finding_id: int | None, deleted: bool, limit: int, as_json: bool
) -> None:
    """The rules that hold, and those that expired, with what they explain."""
    request = api.ListRulesRequest(source=source, finding_id=finding_id or 0, include_deleted=deleted)
    response = link.call(lambda calls: _fetch_rules(calls, request, limit))
    if as_json:
        print_json(response)
    elif response.rules:
        make_console().print(build_rules_table(response.rules))
    else:
        click.echo("there are no rules; make one with: abreast rules add")


async def _fetch_rules(calls: Calls, request: api.ListRulesRequest, limit: int) -> api.ListRulesResponse:
    response = api.ListRulesResponse()
    for request.page_size in split_page_sizes(limit):
        page = await calls.rules.ListRules(request, timeout=calls.timeout_s)
        response.rules.extend(page.rules)
        request.page_token = response.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return response


@rules_command.command("add")
@rule_action_argument
@rule_options
@click.option("--name", default="", help="For people.  [default: made from the rest]")
@click.option("--owner", required=True, help="Who answers for it.")
@click.option("--reason", required=True, help="Why the difference is known.")
@click.option(
    "--expires", required=True, help="Until when: 90d, 12w, or the first day on which it no longer holds."
)
@force_option
@actor_option
@json_option
@connection_options
def add_rule(
    link: SidecarClient,
    finding_id: int | None,
    expires: str,
    force: bool,
    actor: str | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Make a rule. With --for it covers just that finding; what is broader is refused."""
    request = api.CreateRuleRequest(
        rule=build_rule_message(fields, expires),
        finding_id=finding_id or 0,
        force=force,
        actor=default_actor(actor),
    )
    response = link.call(lambda calls: calls.rules.CreateRule(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        click.echo(f"{format_rule_title(response.rule)}: it holds now, and what is stored is judged again")


@rules_command.command("preview")
@rule_action_argument
@rule_options
@json_option
@connection_options
def preview_rule(link: SidecarClient, finding_id: int | None, as_json: bool, **fields: Any) -> int:
    """What a rule would hide of what is stored. Exits with 1 where `add` would refuse it."""
    request = api.PreviewRuleRequest(rule=build_rule_message(fields), finding_id=finding_id or 0)
    response = link.call(lambda calls: calls.rules.PreviewRule(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        _print_objections(response.objections)
        if response.findings:
            make_console().print(build_hidden_findings_table(response.findings))
        elif response.rule.action == api.RULE_ACTION_WAIVE_COVERAGE:
            click.echo("it hides no difference; a verdict that it keeps from INCONCLUSIVE names it")
        else:
            click.echo("it would hide nothing that is stored")
    return ExitCode.CHECK_FAILED if response.objections else ExitCode.OK


@rules_command.command("delete")
@click.argument("id", type=click.IntRange(min=1))
@actor_option
@json_option
@connection_options
def delete_rule(link: SidecarClient, id: int, actor: str | None, as_json: bool) -> None:  # noqa: A002  # the argument's name
    """End a rule. What it hid is back within seconds."""
    request = api.DeleteRuleRequest(id=id, actor=default_actor(actor))
    response = link.call(lambda calls: calls.rules.DeleteRule(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        click.echo(f"{format_rule_title(response.rule)}: ended, and what is stored is judged again")


@rules_command.command("import")
@file_argument
@source_option
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@force_option
@actor_option
@json_option
@connection_options
def import_rules(
    link: SidecarClient,
    file: Path,
    source: str | None,
    dry_run: bool,
    force: bool,
    actor: str | None,
    as_json: bool,
) -> int:
    """Make the rules of a source those of a file: new ones begin, missing ones end, the others stay."""
    request = api.ApplyRulesRequest(
        source=source or file.name,
        rules=read_rules(file),
        dry_run=dry_run,
        force=force,
        actor=default_actor(actor),
    )
    response = link.call(lambda calls: calls.rules.ApplyRules(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        _print_objections(response.objections)
        click.echo(format_apply_plan(response))
    return ExitCode.CHECK_FAILED if response.objections else ExitCode.OK


@rules_command.command("export")
@click.option("--source", default=None, help="Only rules of this source.")
@connection_options
def export_rules(link: SidecarClient, source: str | None) -> None:
    """The rules that hold, as a file."""
    request = api.ListRulesRequest(source=source)
    response = link.call(lambda calls: _fetch_rules(calls, request, 1000))
    click.echo(
        dump_rules_yaml([rule for rule in response.rules if rule.state == api.RULE_STATE_IN_FORCE]), nl=False
    )


@rules_command.command("check")
@file_argument
def check_rule_file(file: Path) -> None:
    """Whether a file can be imported. Needs no sidecar."""
    click.echo(f"{file}: {format_quantity(len(read_rules(file)), 'rule')}")


@rules_command.command("schema")
def print_rule_schema() -> None:
    """The JSON schema of a file, for editors."""
    from importlib.resources import files

    click.echo((files("abreast_sidecar.compare") / "rules.schema.json").read_text(), nl=False)


def _print_objections(objections: Any) -> None:
    for objection in objections:
        make_console().print(style_text(f"warning: {to_printable(objection)}", "warn"))
