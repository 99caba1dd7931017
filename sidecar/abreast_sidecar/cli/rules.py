"""`abreast rules`: what is known about differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.connection import Calls, Link, connected, json_option, page_sizes, print_json
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import counted, printable
from abreast_sidecar.cli.parameters import limit_option
from abreast_sidecar.cli.rule_files import as_yaml, read_rules
from abreast_sidecar.cli.rule_options import RULE_ACTION, message, rule_options
from abreast_sidecar.cli.rule_tables import hidden, listing, plan, title
from abreast_sidecar.cli.shift import actor_option, actor_or_user
from abreast_sidecar.cli.tables import console, styled

force_option = click.option(
    "--force", is_flag=True, help="Also where it hides more than it is made for, or what somebody confirmed."
)
source_option = click.option(
    "--source", default=None, help="Whose rules these are.  [default: the file's name]"
)
file_argument = click.argument("file", type=click.Path(path_type=Path))


@click.group()
def command() -> None:
    """What is known about differences: to be ignored, tolerated, expected."""


@command.command("list")
@click.option("--source", default=None, help="Only rules of this source, such as a file's name.")
@click.option(
    "--finding", "finding_id", type=click.IntRange(min=1), default=None, help="Only those that explain it."
)
@click.option("--deleted", is_flag=True, help="Also rules that were deleted.")
@limit_option
@json_option
@connected
def list_(
    link: Link, source: str | None, finding_id: int | None, deleted: bool, limit: int, as_json: bool
) -> None:
    """The rules that hold, and those that expired, with what they explain."""
    request = api.ListRulesRequest(source=source, finding_id=finding_id or 0, include_deleted=deleted)
    found = link.run(lambda calls: _list(calls, request, limit))
    if as_json:
        print_json(found)
    elif found.rules:
        console().print(listing(found.rules))
    else:
        click.echo("there are no rules; make one with: abreast rules add")


async def _list(calls: Calls, request: api.ListRulesRequest, limit: int) -> api.ListRulesResponse:
    found = api.ListRulesResponse()
    for request.page_size in page_sizes(limit):
        page = await calls.rules.ListRules(request, timeout=calls.timeout)
        found.rules.extend(page.rules)
        request.page_token = found.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return found


@command.command("add")
@RULE_ACTION
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
@connected
def add(
    link: Link,
    finding_id: int | None,
    expires: str,
    force: bool,
    actor: str | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Make a rule. With --for it covers just that finding; what is broader is refused."""
    request = api.CreateRuleRequest(
        rule=message(fields, expires), finding_id=finding_id or 0, force=force, actor=actor_or_user(actor)
    )
    found = link.run(lambda calls: calls.rules.CreateRule(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        click.echo(f"{title(found.rule)}: it holds now, and what is stored is judged again")


@command.command("preview")
@RULE_ACTION
@rule_options
@json_option
@connected
def preview(link: Link, finding_id: int | None, as_json: bool, **fields: Any) -> int:
    """What a rule would hide of what is stored. Exits with 1 where `add` would refuse it."""
    request = api.PreviewRuleRequest(rule=message(fields), finding_id=finding_id or 0)
    found = link.run(lambda calls: calls.rules.PreviewRule(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        _objections(found.objections)
        if found.findings:
            console().print(hidden(found.findings))
        elif found.rule.action == api.RULE_ACTION_WAIVE_COVERAGE:
            click.echo("it hides no difference; a verdict that it keeps from INCONCLUSIVE names it")
        else:
            click.echo("it would hide nothing that is stored")
    return Exit.NO if found.objections else Exit.OK


@command.command("delete")
@click.argument("id", type=click.IntRange(min=1))
@actor_option
@json_option
@connected
def delete(link: Link, id: int, actor: str | None, as_json: bool) -> None:  # noqa: A002  # the argument's name
    """End a rule. What it hid is back within seconds."""
    request = api.DeleteRuleRequest(id=id, actor=actor_or_user(actor))
    found = link.run(lambda calls: calls.rules.DeleteRule(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        click.echo(f"{title(found.rule)}: ended, and what is stored is judged again")


@command.command("import")
@file_argument
@source_option
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@force_option
@actor_option
@json_option
@connected
def import_(
    link: Link, file: Path, source: str | None, dry_run: bool, force: bool, actor: str | None, as_json: bool
) -> int:
    """Make the rules of a source those of a file: new ones begin, missing ones end, the others stay."""
    request = api.ApplyRulesRequest(
        source=source or file.name,
        rules=read_rules(file),
        dry_run=dry_run,
        force=force,
        actor=actor_or_user(actor),
    )
    found = link.run(lambda calls: calls.rules.ApplyRules(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        _objections(found.objections)
        click.echo(plan(found))
    return Exit.NO if found.objections else Exit.OK


@command.command("export")
@click.option("--source", default=None, help="Only rules of this source.")
@connected
def export(link: Link, source: str | None) -> None:
    """The rules that hold, as a file."""
    request = api.ListRulesRequest(source=source)
    found = link.run(lambda calls: _list(calls, request, 1000))
    click.echo(as_yaml([one for one in found.rules if one.state == api.RULE_STATE_IN_FORCE]), nl=False)


@command.command("check")
@file_argument
def check(file: Path) -> None:
    """Whether a file can be imported. Needs no sidecar."""
    click.echo(f"{file}: {counted(len(read_rules(file)), 'rule')}")


@command.command("schema")
def schema() -> None:
    """The JSON schema of a file, for editors."""
    from importlib.resources import files

    click.echo((files("abreast_sidecar.compare") / "rules.schema.json").read_text(), nl=False)


def _objections(found: Any) -> None:
    for one in found:
        console().print(styled(f"warning: {printable(one)}", "warn"))
