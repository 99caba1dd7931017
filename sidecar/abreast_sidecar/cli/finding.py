"""`abreast finding ID`: one cause, with examples to try."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1.rule_pb2 import ExplainedFinding, Rule
from abreast_sidecar.cli.answers import ended
from abreast_sidecar.cli.connection import Link, connected, json_option, print_json
from abreast_sidecar.cli.curl import curl
from abreast_sidecar.cli.explanations import why
from abreast_sidecar.cli.findings import difference
from abreast_sidecar.cli.humane import ago, count, counted, part_of, percent, printable
from abreast_sidecar.cli.rule_tables import title
from abreast_sidecar.cli.shift import actor_option
from abreast_sidecar.cli.statuses import history, said, say, told, word_options
from abreast_sidecar.cli.tables import (
    Console,
    console,
    differences,
    endpoint_name,
    impact_name,
    kind_name,
    styled,
    version_name,
    where,
)


@click.command()
@click.argument("id", type=click.IntRange(min=1))
@click.option(
    "--examples", type=click.IntRange(min=0), default=3, show_default=True, help="At most so many examples."
)
@click.option(
    "--url", default="", help="For the curl lines: where to send the request, such as http://127.0.0.1:8002."
)
@word_options
@click.option(
    "--release", default="", help="With --fixed: the release of new that has the fix.  [default: the next]"
)
@click.option("--reason", default="", help="Why, for the record.")
@actor_option
@json_option
@connected
def command(
    link: Link,
    id: int,  # noqa: A002  # the argument's name
    examples: int,
    url: str,
    word: str | None,
    release: str,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """One finding, with examples to try; or say what is known of it.

    The curl lines ask "$URL": set it to old's or new's address, or name it with --url.
    """
    if (saying := said(word, reason, actor, release)) is not None:
        saying.id = id
        say(link, saying)
    request = api.GetFindingRequest(id=id)
    found = link.run(lambda calls: calls.comparison.GetFinding(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        show(console(), found, dt.datetime.now(dt.UTC), examples=examples, url=url)


def show(
    out: Console, found: api.GetFindingResponse, now: dt.datetime, *, examples: int = 3, url: str = ""
) -> None:
    finding = found.finding
    head = styled(f"#{finding.id}  ", "bold")
    head.append(styled(impact_name(finding.impact)))
    head.append(f"  {endpoint_name(finding.endpoint)}  {where(finding.part, finding.path)}")
    out.print(head)
    made = facts(finding, now)
    made.add_row("status", told(finding, found.events, now))
    if found.HasField("feature"):
        made.add_row("only with", feature(found.feature))
    for rule in found.explained_by:
        made.add_row("explained by", explained(rule, finding.id))
    for one in finding.explanations:
        if one.cause == api.EXPLANATION_CAUSE_DRIFT:
            made.add_row("drift", f"{counted(one.pairs, 'pair')} more: {why(one)}")
    out.print(made)
    shown = found.examples[:examples]
    for number, example in enumerate(shown, 1):
        out.print()
        out.print(styled(f"example {number} of {len(found.examples)}", "bold"))
        show_example(out, example, finding, url)
    if not found.examples:
        out.print("\nno example is kept of it any more")
    history(out, found.events, now)


def facts(finding: api.Finding, now: dt.datetime) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_row("service", printable(finding.endpoint.service))
    made.add_row(
        "difference",
        f"{difference(finding)} ({kind_name(finding.kind)})" if finding.summary else kind_name(finding.kind),
    )
    share = rate(finding)
    of = f" of {count(finding.compared)} compared ({share})" if share else ""
    made.add_row("requests", f"{count(finding.count)}{of}")
    made.add_row("seen", f"first {ago(finding.first_seen, now)}, last {ago(finding.last_seen, now)}")
    if labels := releases(finding):
        made.add_row("releases", labels)
    if finding.count or finding.baseline_count:
        made.add_row("noise", noise(finding))
    return made


def rate(finding: api.Finding) -> str:
    """`6.9%, surely 5.1% to 9.2%`: the interval holds however often one looks."""
    share = part_of(finding.count, finding.compared)
    if not share or not finding.HasField("rate"):
        return share
    return f"{share}; with 95% confidence {percent(finding.rate.low)} to {percent(finding.rate.high)}"


def releases(finding: api.Finding) -> str:
    """In which it was seen, the latest first."""
    sides = (("new", finding.new_releases), ("old", finding.old_releases))
    named = [(side, [printable(label) for label in labels if label]) for side, labels in sides]
    return "; ".join(f"{side} {', '.join(labels)}" for side, labels in named if labels)


def explained(rule: Rule, finding_id: int) -> str:
    """`rule 7 (cents): rounding, 1,204 pairs`."""
    mine = next((one for one in rule.findings if one.finding_id == finding_id), ExplainedFinding())
    before = f"; {count(mine.unknown)} were judged before it" if mine.unknown else ""
    return f"{title(rule)}: {printable(rule.reason)}, {counted(mine.pairs, 'pair')}{before}"


def feature(found: api.RequestFeature) -> str:
    has, shows = (part_of(round(1000 * share), 1000) for share in (found.coverage, found.precision))
    return (
        f"{printable(found.text)}: {has} of the requests that show it, and {shows} of those with it show it"
    )


def noise(finding: api.Finding) -> str:
    said = {api.FINDING_STATE_REAL: "no", api.FINDING_STATE_NOISE: "yes"}.get(
        finding.state, "not decided yet"
    )
    return f"{said}: {printable(finding.reason)}" if finding.reason else said


def show_example(out: Console, example: api.PairDetail, finding: api.Finding, url: str) -> None:
    pair = example.pair
    line, lacks = curl(example, url)
    out.print(f"  {printable(line)}", soft_wrap=True)  # one line, to be copied
    for lack in lacks:
        out.print(styled(f"  without {lack}", "dim"))
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_row(
        "  answers",
        f"old {ended(example, common.VERSION_OLD)}, new {ended(example, common.VERSION_NEW)}; the user got {version_name(pair.live)}'s",
    )
    made.add_row("  all of it", f"abreast pair {printable(pair.id)}")
    out.print(made)
    mine = [
        d
        for d in example.differences
        if (d.part, d.path, d.kind) == (finding.part, finding.path, finding.kind)
    ]
    if mine:
        out.print(differences(mine))
    if others := len(example.differences) - len(mine):
        out.print(
            styled(
                f"  and {others} other {'difference' if others == 1 else 'differences'} in this pair", "dim"
            )
        )
