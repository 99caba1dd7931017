"""`abreast drill`: a fault for a part of the users on new, and what users notice of it."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import click
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import rollout_pb2 as api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import SHARE_TYPE, Audit, PrintingClient, change_options
from abreast_sidecar.cli.rollout import DURATION_TYPE
from abreast_sidecar.client.output import Console, format_count, format_percent, make_console, make_grid, style_text
from abreast_sidecar.client.sidecar_client import Calls

POLL_S = 0.5
COUNT_LAG_S = 3.0  # until the sidecar has read Envoy's counters twice


@dataclass(frozen=True)
class DrillReport:
    """The result of a drill. None means unknown, or that it did not happen. Times are in seconds since the start."""

    drilled_share: float  # among all users
    responses: int | None  # to users, during the drill
    errors: int | None  # server errors among them
    faults: int | None  # requests that got the fault
    guard_acted_after: float | None
    all_on_old_after: float | None  # until all Envoys had the rollback
    ended_by: str  # deadline, rollback or interrupt

    @property
    def trouble(self) -> str:
        if self.faults is None or self.errors is None:
            return "no sidecar reads Envoy's counters, so it is unknown what users noticed; set ABREAST_ENVOY_ADMIN"
        if not self.faults:
            return "no request got the fault: send more traffic, with the header of --by-header, or raise --share"
        return f"users got {format_count(self.errors)} server errors" if self.errors else ""


@click.command()
@click.option("--share", type=SHARE_TYPE, default=0.1, help="Part of the requests to new.  [default: 10%]")
@click.option("--by-header", is_flag=True, help="Only requests with the header abreast-drill get the fault.")
@click.option("--delay", type=DURATION_TYPE, help="Delay these requests instead of failing them, such as 2s.")
@click.option("--duration", type=DURATION_TYPE, default="30s", show_default=True, help="1s to 10m, whole seconds.")
@change_options
def drill_command(
    link: PrintingClient,
    service: str,
    share: float,
    delay: Duration | None,
    duration: Duration,
    audit: Audit,
    *,
    by_header: bool,
) -> int:
    """Fail a part of the requests to new on purpose, and report what users notice.

    Envoy injects the fault, and old answers these users. The fault ends after its duration, with any change of the
    traffic settings, and if this command ends. Exits with 1 if users got server errors, or no request got the fault.
    """
    from abreast_sidecar.cli.up import signals_as_interrupts

    request = api.StartDrillRequest(
        service=service, share=share, by_header=by_header, delay=delay, duration=duration, **audit
    )
    with signals_as_interrupts():
        report = link.call(lambda calls: run_drill(calls, request))
    if link.as_json:
        click.echo(json.dumps({**asdict(report), "passed": not report.trouble, "trouble": report.trouble}, indent=2))
    else:
        print_drill_report(make_console(), report)
    if report.ended_by == "interrupt":
        return ExitCode.INTERRUPTED
    return ExitCode.CHECK_FAILED if report.trouble else ExitCode.OK


async def run_drill(calls: Calls, request: api.StartDrillRequest) -> DrillReport:
    before = (await calls.rollout.GetDrill(api.GetDrillRequest(service=request.service))).drill
    service, ended_by, share = before.service, "deadline", 0.0
    try:
        async with interruptible():
            await calls.rollout.StartDrill(request)
            share = (await calls.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service))).traffic.drill_share
            while (await calls.rollout.GetDrill(api.GetDrillRequest(service=service))).drill.active:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
    except InterruptedError:
        ended_by = "interrupt"
        await calls.rollout.EndDrill(api.EndDrillRequest(service=service, actor=request.actor, reason="interrupted"))
    events = await calls.traffic.ListTrafficEvents(traffic_pb2.ListTrafficEventsRequest(service=service, page_size=10))
    rollback, elapsed = find_rollback(list(events.events))
    traffic = await calls.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service))
    await asyncio.sleep(COUNT_LAG_S)
    after = (await calls.rollout.GetDrill(api.GetDrillRequest(service=service))).drill
    counts = {
        name: getattr(after, name) - getattr(before, name) if before.HasField(name) else None
        for name in ("responses", "server_errors", "faults")
    }
    report = DrillReport(
        drilled_share=share,
        responses=counts["responses"],
        errors=counts["server_errors"],
        faults=counts["faults"],
        guard_acted_after=elapsed if rollback and rollback.actor == "guard" else None,
        all_on_old_after=None if elapsed is None else elapsed + _slowest_acknowledgement(traffic),
        ended_by="rollback" if rollback and ended_by == "deadline" else ended_by,
    )
    if ended_by == "deadline":
        await calls.rollout.EndDrill(
            api.EndDrillRequest(
                service=service, passed=not report.trouble, actor=request.actor, reason=report.trouble or "passed"
            )
        )
    return report


@asynccontextmanager
async def interruptible() -> AsyncIterator[None]:
    """Raise InterruptedError at Ctrl-C and SIGTERM, so that the drill can still be ended."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)  # as asyncio does for Ctrl-C
    try:
        yield
    except asyncio.CancelledError as error:
        task.uncancel()
        raise InterruptedError from error
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def find_rollback(events: list[traffic_pb2.TrafficEvent]) -> tuple[traffic_pb2.TrafficEvent | None, float | None]:
    """Return the first rollback since the last start of a drill, and the seconds between them. Newest events first."""
    rollback = None
    for event in events:
        if event.action == "rollback":
            rollback = event
        if event.action == "drill_start":
            if rollback is None:
                break
            elapsed = rollback.time.ToDatetime(dt.UTC) - event.time.ToDatetime(dt.UTC)
            return rollback, elapsed.total_seconds()
    return None, None


def _slowest_acknowledgement(response: traffic_pb2.GetTrafficResponse) -> float:
    return max((e.acknowledged_after.ToTimedelta().total_seconds() for e in response.envoys), default=0.0)


def print_drill_report(out: Console, report: DrillReport) -> None:
    def text(value: Any) -> str:
        return "?" if value is None else format_count(value)

    def seconds(value: float | None) -> str:
        return "no" if value is None else f"after {value:.1f} s"

    rows = {
        "users in the drill": format_percent(report.drilled_share),
        "responses to users": text(report.responses),
        "requests with the fault": text(report.faults),
        "server errors for users": text(report.errors),
        "the guard rolled back": seconds(report.guard_acted_after),
        "all users were on old": seconds(report.all_on_old_after),
        "ended by": report.ended_by,
    }
    out.print(make_grid(rows.items()))
    out.print(style_text(report.trouble or "passed: users noticed no error", "fail" if report.trouble else "ok"))
