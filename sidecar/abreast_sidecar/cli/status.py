"""`abreast status`: one look at what has been compared so far."""

from __future__ import annotations

import datetime as dt
import json

import click
import grpc.aio
from rich.table import Table
from rich.text import Text

from abreast.v1 import comparison_pb2 as api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli.connection import (
    Calls,
    Link,
    as_text,
    connected,
    json_option,
    service_option,
    window,
)
from abreast_sidecar.cli.humane import ago, count, counted, part_of, percent, printable, seconds
from abreast_sidecar.cli.parameters import since_option, until_option
from abreast_sidecar.cli.steering import Steering, ask_steering, steering_lines
from abreast_sidecar.cli.tables import Console, console, outcome_name, styled, table

EMPTY = "nothing has been compared yet; send requests through Envoy, and if this stays so: abreast doctor"

LONGEST_REASON = 120  # characters
SETTLED = 30.0  # seconds without a row
CLOCKS = 300.0  # seconds that they may be apart
CALM, CALM_SHARE = (
    20,
    0.01,
)  # requests, and a share of them, that are on their way at any moment: the counts are read in turn


@click.command()
@service_option
@since_option
@until_option
@json_option
@connected
def command(
    link: Link, service: str, since: dt.datetime | None, until: dt.datetime | None, as_json: bool
) -> None:
    """How the sampled requests ended, held against Envoy's own count."""
    request = api.GetSummaryRequest(service=service, window=window(since, until))
    summary, traffic, steering = link.run(lambda calls: _ask(calls, request))
    if as_json:
        parts = {"summary": summary, "traffic": traffic}
        texts = {name: part and json.loads(as_text(part)) for name, part in parts.items()}
        click.echo(json.dumps(texts, indent=2, ensure_ascii=False))
        return
    show(console(), summary, traffic, dt.datetime.now(dt.UTC), steering)


async def _ask(
    calls: Calls, request: api.GetSummaryRequest
) -> tuple[api.GetSummaryResponse, traffic_pb2.GetTrafficResponse | None, Steering | None]:
    """Traffic may not be known yet where captures are, and the other way round."""
    summary = await calls.comparison.GetSummary(request, timeout=calls.timeout)
    question = traffic_pb2.GetTrafficRequest(service=summary.service)
    try:
        traffic = await calls.traffic.GetTraffic(question, timeout=calls.timeout)
        return summary, traffic, await ask_steering(calls, traffic.traffic.service)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return summary, None, None


def show(
    out: Console,
    summary: api.GetSummaryResponse,
    traffic: traffic_pb2.GetTrafficResponse | None,
    now: dt.datetime,
    steering: Steering | None = None,
) -> None:
    out.print(styled(summary.service or "(no service yet)", "bold"))
    if traffic is not None:
        out.print(traffic_line(traffic.traffic))
    for line in steering_lines(steering, now):
        out.print(line)
    out.print()
    if summary.pairs:
        out.print(_outcomes(summary))
        span = since_first(summary, now)
        out.print(f"\n{counted(summary.pairs, 'request')} {span}")
    else:
        out.print(EMPTY)
    out.print(_accounts(summary, now))


def since_first(summary: api.GetSummaryResponse, now: dt.datetime) -> str:
    lasted = (summary.last.ToDatetime() - summary.first.ToDatetime()).total_seconds()
    return f"in {seconds(lasted)}, the last {ago(summary.last, now)}"


def traffic_line(traffic: traffic_pb2.Traffic) -> str:
    back = " (rolled back)" if traffic.rolled_back else ""
    return (
        f"users: {percent(1 - traffic.new_share)} old, {percent(traffic.new_share)} new{back} · "
        f"mirrored: {percent(traffic.sample_safe)} of safe requests, {percent(traffic.sample_unsafe)} of others"
    )


def _outcomes(summary: api.GetSummaryResponse) -> Table:
    made = table("outcome", "requests", "share", "", right=frozenset({"requests", "share"}))
    for row in summary.outcomes:
        name = outcome_name(row.outcome)
        note = ""
        if name == "mismatch" and summary.explained:
            note = f"{count(summary.explained)} of them noise or additive only"
        made.add_row(styled(name), count(row.count), part_of(row.count, summary.pairs), note)
    return made


def _accounts(summary: api.GetSummaryResponse, now: dt.datetime) -> Table:
    made = table("", "", "")
    if summary.HasField("envoy_sampled"):
        made.add_row("sampled by Envoy", count(summary.envoy_sampled), _unaccounted(summary, now))
    else:
        made.add_row("sampled by Envoy", "?", "no Envoy's admin address is known (ABREAST_ENVOY_ADMIN)")
    if summary.HasField("pending"):
        made.add_row(
            "pending", count(summary.pending), "wait for a copy or a worker" if summary.pending else ""
        )
    else:
        made.add_row("pending", "?", "Redis can't be reached (abreast doctor)")
    drops = sum(drop.count for drop in summary.drops)
    by_reason = ", ".join(
        f"{printable(d.place)} {printable(d.reason)} {count(d.count)}" for d in summary.drops if d.count
    )
    made.add_row("dropped", styled(count(drops), "fail" if drops else ""), by_reason)
    late = summary.captures.late
    if late:
        made.add_row("late", count(late), "captures that came after their pair had been compared")
    if summary.not_sent:
        made.add_row("not sent", count(summary.not_sent), "copies that never left Envoy")
    for one in summary.poison:
        made.add_row("put apart", styled(count(one.count), "fail"), printable(one.reason, LONGEST_REASON))
    if abs(ahead := summary.ledger_clock_ahead.ToTimedelta().total_seconds()) > CLOCKS:
        text = f"Postgres's is {seconds(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the sidecar's: synchronise them"
        made.add_row("clocks", styled("!", "warn"), text)
    made.add_row("findings", count(summary.findings), "see: abreast findings" if summary.findings else "")
    return made


def _settled(summary: api.GetSummaryResponse, now: dt.datetime) -> bool:
    """Whether nothing has come for long, and nothing waits."""
    known = summary.HasField("pending") and not summary.pending and summary.HasField("last")
    return known and (now - summary.last.ToDatetime(dt.UTC)).total_seconds() > SETTLED


def _unaccounted(summary: api.GetSummaryResponse, now: dt.datetime) -> str | Text:
    number = abs(summary.unaccounted)
    if not number:
        return "all of them are in the ledger"
    if summary.unaccounted > 0 and _settled(summary, now):
        return styled(f"{count(number)} of them did not come, and nothing is on its way", "warn")
    if number <= max(CALM, CALM_SHARE * summary.envoy_sampled):
        return (
            f"{count(number)} {'on their way' if summary.unaccounted > 0 else 'more on their way from Envoy'}"
        )
    if summary.unaccounted > 0:
        return styled(f"{count(number)} of them are on their way, or lost", "warn")
    return styled(f"{count(number)} fewer than in the ledger: an Envoy's count is missing or late", "warn")
