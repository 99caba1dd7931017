"""Runs the demo: deploys the shop, sends the traffic, and prints progress and result."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from abreast_demo.deploy import LOOPBACK, PortReservations, ShopDeployment, SidecarCalls, StackAddresses, deploy_shop
from abreast_demo.load import LoadGenerator, UserTally, generate_requests
from abreast_demo.planted_changes import (
    CPU_COST_NOTE,
    PLANTED_ADDITIONS,
    PLANTED_NOISE,
    PLANTED_REGRESSIONS,
    DemoResult,
    LedgerCounts,
    ReportedFinding,
    select_regressions,
)
from abreast_sidecar.client.output import (
    format_count,
    format_percent,
    format_quantity,
    make_table,
    style_text,
    to_printable,
)
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.stack.data import list_runs
from abreast_sidecar.stack.stack import Stack

USERS_PORT, GRPC_PORT, HTTP_PORT = 8080, 50051, 8090
NEW_SHARE_STEPS = (0.0, 0.1, 0.25)  # share of users on new, each for a third of the traffic
MAX_STEP_STRETCH = 4  # a slow machine may take so many times as long for the same requests
TRICKLE_REQUESTS_PER_S = 3.0  # while the shop stays open
FINDINGS_POLL_S = 0.5
NUMERIC_COLUMNS = frozenset({"finding", "pairs", "requests"})

TableRow = tuple[Text | str, ...]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    duration_s: float = 15.0
    requests_per_s: float = 150.0
    seed: int = 1
    listen: SocketAddress | None = None
    keep_open: bool = True


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """The result, and ids of example pairs by the id of their finding."""

    stack: Stack
    result: DemoResult
    example_pair_ids: dict[int, str]


def run_demo(
    options: DemoOptions, output: ConsoleOutput, on_outcome: Callable[[DemoOutcome], None]
) -> DemoResult | None:
    """Run the demo. Return None if the user stops it before there is a result."""
    results: list[DemoResult] = []
    _treat_signals_as_interrupt()
    with PortReservations() as ports:
        addresses = StackAddresses(
            listen=options.listen or SocketAddress(LOOPBACK, ports.reserve(USERS_PORT)),
            grpc=SocketAddress(LOOPBACK, ports.reserve(GRPC_PORT)),
            http=SocketAddress(LOOPBACK, ports.reserve(HTTP_PORT)),
        )
        try:
            with deploy_shop(addresses, output.show_wait) as deployment:
                output.print_ready(deployment.stack, options)
                asyncio.run(_run_session(deployment, options, output, on_outcome, results))
        except KeyboardInterrupt:
            output.print_message("stopped")
    return results[0] if results else None


def _treat_signals_as_interrupt() -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C, and SIGINT even if a script's `&` made the process ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))


async def _run_session(
    deployment: ShopDeployment,
    options: DemoOptions,
    output: ConsoleOutput,
    on_outcome: Callable[[DemoOutcome], None],
    results: list[DemoResult],
) -> None:
    user_requests, stack = generate_requests(options.seed), deployment.stack
    async with (
        deployment.connect() as calls,
        LoadGenerator(stack.envoy_url, lambda _response: output.update_progress(load.tally)) as load,
    ):
        announcement = asyncio.create_task(_announce_regressions(calls, output))
        try:
            step_duration_s = options.duration_s / len(NEW_SHARE_STEPS)
            for share in NEW_SHARE_STEPS:
                if share:
                    await calls.set_new_share(share, "demo")
                output.show_step(share)
                await load.send(
                    itertools.islice(user_requests, round(step_duration_s * options.requests_per_s)),
                    requests_per_s=options.requests_per_s,
                    timeout_s=step_duration_s * MAX_STEP_STRETCH,
                )
        finally:
            announcement.cancel()
        output.show_wait("waiting until the ledger holds every request")
        result = DemoResult(
            load.tally,
            await calls.wait_until_settled(load.tally.safe_requests),
            await calls.wait_for_planted_findings(),
        )
        results.append(result)
        examples = {
            finding.id: await calls.get_example_pair_id(finding.id) for finding in result.regression_findings[:1]
        }
    on_outcome(DemoOutcome(stack, result, examples))
    if options.keep_open:
        async with LoadGenerator(stack.envoy_url) as trickle:
            await trickle.send(user_requests, requests_per_s=TRICKLE_REQUESTS_PER_S)


async def _announce_regressions(calls: SidecarCalls, output: ConsoleOutput) -> None:
    """Print each planted regression as soon as the sidecar lists it."""
    unreported = {change.location for change in PLANTED_REGRESSIONS}
    with contextlib.suppress(grpc.aio.AioRpcError):  # the session's own calls fail too, and raise
        while unreported:
            for finding in select_regressions(await calls.list_findings()):
                if finding.location in unreported:
                    unreported.remove(finding.location)
                    output.print_regression(finding)
            await asyncio.sleep(FINDINGS_POLL_S)


class ConsoleOutput(contextlib.AbstractContextManager["ConsoleOutput"]):
    """A context manager that prints the progress and, with `show_results`, the result of a run."""

    def __init__(self, console: Console, *, show_results: bool) -> None:
        self.console = console
        self.show_results = show_results
        self._progress: Progress | None = None
        self._task_id = TaskID(0)

    def __exit__(self, *_error: object) -> None:
        self._end_progress()

    def print_message(self, text: str) -> None:
        self._end_progress()
        self.console.print(text, style="dim", soft_wrap=True)

    def show_wait(self, text: str) -> None:
        """Print a step, on a terminal with its elapsed time until the next output."""
        if not self.console.is_terminal:
            self.print_message(text)
            return
        self._end_progress()
        columns = (TextColumn("{task.description}", style="dim"), TimeElapsedColumn())
        # A timer signal instead of a thread, because servers are forked during the wait.
        self._progress = update_progress = Progress(*columns, console=self.console, auto_refresh=False)
        update_progress.add_task(text, total=None)
        update_progress.start()
        signal.signal(signal.SIGALRM, lambda _number, _frame: update_progress.refresh())
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)

    def print_ready(self, stack: Stack, options: DemoOptions) -> None:
        self._end_progress()
        self.console.print(f"the shop: {stack.envoy_url}/catalogue/categories", soft_wrap=True)
        self.console.print(f"abreast:  {stack.http_url}", soft_wrap=True)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} requests, {task.fields[errors]:,} user errors"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task_id = self._progress.add_task("", total=options.duration_s * options.requests_per_s, errors=0)
            self._progress.start()

    def show_step(self, share: float) -> None:
        text = f"new answers {format_percent(share)} of users" if share else "old answers all users"
        if self._progress is None:
            self.console.print(text, style="dim")
        else:
            self._progress.update(self._task_id, description=text)

    def update_progress(self, tally: UserTally) -> None:
        if self._progress is not None:
            self._progress.update(self._task_id, completed=tally.requests, errors=tally.user_errors)

    def print_regression(self, finding: ReportedFinding) -> None:
        self.console.print(style_text("found", "ok"), "", _format_finding_location(finding), soft_wrap=True)

    def print_outcome(self, outcome: DemoOutcome) -> None:
        self._end_progress()
        if not self.show_results:
            return
        result = outcome.result
        self._print_table(
            f"Regressions: {len(result.detected_changes)} of {len(PLANTED_REGRESSIONS)} found",
            ("", "finding", "pairs", "planted change, and its finding"),
            _list_regression_rows(result),
        )
        self._print_table(
            "Other differences, which are not regressions",
            ("", "pairs", "harmless change, and where it is"),
            _list_harmless_rows(result),
        )
        if result.unexpected_findings:
            self._print_table(
                f"{format_quantity(len(result.unexpected_findings), 'finding')} without a planted change",
                ("", "finding without a planted change", "pairs", "finding"),
                (
                    (
                        style_text("unexpected", "fail"),
                        _format_finding_location(finding),
                        format_count(finding.count),
                        str(finding.id),
                    )
                    for finding in result.unexpected_findings
                ),
            )
        self._print_table(
            "The ledger: " + _format_ledger_state(result.ledger),
            ("outcome", "requests"),
            _list_ledger_rows(result.ledger),
        )
        errors = result.tally.user_errors
        error_text = style_text(format_quantity(errors, "user error"), "fail" if errors else "ok")
        self.console.print(f"{format_quantity(result.tally.requests, 'request')}, ", error_text, sep="")
        self._print_next_commands(outcome)

    def _print_table(self, title: str, columns: tuple[str, ...], rows: Iterable[TableRow]) -> None:
        table = make_table(*columns, numeric_columns=NUMERIC_COLUMNS)
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(title, style="bold")
        self.console.print(table)

    def _print_next_commands(self, outcome: DemoOutcome) -> None:
        address = outcome.stack.grpc_address
        flag = "" if list_runs() == [address] else f" --address {address}"  # commands find the only run
        self.console.print()
        self.console.print("Commands to try in another terminal", style="bold")
        for command, description in _list_next_commands(outcome):
            self.console.print(f"# {description}", style="dim", soft_wrap=True)
            self.console.print(f"{program_command()} {command}{flag}", soft_wrap=True)  # one line, to copy it
        self.console.print(f"or open {outcome.stack.http_url}", soft_wrap=True)

    def _end_progress(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _list_regression_rows(result: DemoResult) -> Iterator[TableRow]:
    for change in PLANTED_REGRESSIONS:
        matches = [finding for finding in result.regression_findings if finding.location == change.location]
        for finding in matches:
            lines = _join_lines(change.description, _format_finding_location(finding))
            yield style_text("found", "ok"), str(finding.id), format_count(finding.count), lines
        if not matches:
            yield style_text("missed", "fail"), "", "", _join_lines(change.description, str(change.location))


def _list_harmless_rows(result: DemoResult) -> Iterator[TableRow]:
    for changes, findings, word in (
        (PLANTED_NOISE, result.noise_findings, "noise"),
        (PLANTED_ADDITIONS, result.additive_findings, "additive"),
    ):
        for change in changes:
            pairs = [finding.count for finding in findings if finding.location == change.location]
            state = style_text(word) if pairs else style_text("not seen", "warn")
            yield state, format_count(sum(pairs)), _join_lines(change.description, str(change.location))
    for finding in result.unplanted_slowdowns:
        lines = _join_lines(CPU_COST_NOTE, _format_finding_location(finding))
        yield style_text("slower"), format_count(finding.count), lines


def _list_ledger_rows(ledger: LedgerCounts) -> Iterator[TableRow]:
    for outcome, pair_count in sorted(ledger.outcomes.items(), key=lambda row: -row[1]):
        yield style_text(outcome.replace("_", " "), outcome), format_count(pair_count)
        if outcome == "mismatch":
            yield style_text("  of these only noise or additions", "dim"), format_count(ledger.explained_pairs)
    yield "sum", format_count(ledger.total_pairs)
    yield "Envoy's count", "unknown" if ledger.envoy_sampled is None else format_count(ledger.envoy_sampled)


def _format_ledger_state(ledger: LedgerCounts) -> str:
    if ledger.is_settled(0):
        return "it holds every request that Envoy sampled"
    missing_text = "an unknown number of" if ledger.unaccounted is None else str(ledger.unaccounted)
    pending_text = "an unknown number" if ledger.pending is None else str(ledger.pending)
    return f"{missing_text} requests are missing, {pending_text} are pending"


def _list_next_commands(outcome: DemoOutcome) -> Iterator[tuple[str, str]]:
    yield "findings", "differences, one row per cause"
    for finding, pair in outcome.example_pair_ids.items():
        yield f"finding {finding}", "one finding with examples"
        if pair:
            yield f"pair {pair}", "one request with both answers side by side"
    yield 'traffic set --new 50% --force --reason "a closer look"', "send half of the users to new, despite FAIL"
    yield 'rollback --reason "yen prices"', "send all users to old at once"
    yield "watch", "findings as they arrive"


def program_command() -> str:
    """Return the shell words that start this program from the same folder."""
    program_path, installed_path = sys.argv[0], shutil.which("abreast")
    if Path(program_path).name != "abreast":
        return shlex.join([sys.executable, "-m", "abreast_sidecar"])
    return "abreast" if installed_path and Path(installed_path).samefile(program_path) else shlex.quote(program_path)


def _format_finding_location(finding: ReportedFinding) -> str:
    location = finding.location
    position = {"body": location.path, "header": f"header {location.path}", "latency": "time"}.get(
        location.part, location.part
    )
    return to_printable(f"{location.endpoint}  {position}: {finding.summary or location.kind}")


def _join_lines(first: str, second: str) -> Text:
    return Text.assemble(first, "\n", (second, "dim"))
