"""Console output of a demo run."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from abreast_demo.deploy import LOOPBACK
from abreast_demo.load import UserTally
from abreast_demo.planted_changes import (
    CPU_COST_NOTE,
    PLANTED_ADDITIONS,
    PLANTED_NOISE,
    PLANTED_REGRESSIONS,
    DemoResult,
    LedgerCounts,
    ReportedFinding,
)
from abreast_demo.run import GRPC_PORT, DemoOptions, DemoOutcome
from abreast_sidecar.client.output import (
    format_count,
    format_percent,
    format_quantity,
    make_table,
    style_text,
    to_printable,
)
from abreast_sidecar.stack.stack import Stack


class ConsoleOutput:
    """A context manager that prints the progress and, with `show_results`, the result of a run."""

    def __init__(self, console: Console, *, show_results: bool) -> None:
        self.console = console
        self.show_results = show_results
        self._progress: Progress | None = None
        self._task_id = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        if self.show_results:
            for print_section in (_print_regressions, _print_harmless, _print_unexpected, _print_ledger):
                print_section(self.console, outcome.result)
            _print_next_commands(self.console, outcome)

    def _end_progress(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _print_regressions(console: Console, result: DemoResult) -> None:
    table = make_table(
        "", "finding", "pairs", "planted change, and its finding", numeric_columns=frozenset({"finding", "pairs"})
    )
    for change in PLANTED_REGRESSIONS:
        matches = [finding for finding in result.regression_findings if finding.location == change.location]
        for finding in matches:
            table.add_row(
                style_text("found", "ok"),
                str(finding.id),
                format_count(finding.count),
                _join_lines(change.description, _format_finding_location(finding)),
            )
        if not matches:
            table.add_row(style_text("missed", "fail"), "", "", _join_lines(change.description, str(change.location)))
    _print_titled_table(
        console, f"Regressions: {len(result.detected_changes)} of {len(PLANTED_REGRESSIONS)} found", table
    )


def _print_harmless(console: Console, result: DemoResult) -> None:
    table = make_table("", "pairs", "harmless change, and where it is", numeric_columns=frozenset({"pairs"}))
    for changes, findings, word in (
        (PLANTED_NOISE, result.noise_findings, "noise"),
        (PLANTED_ADDITIONS, result.additive_findings, "additive"),
    ):
        for change in changes:
            pairs = [finding.count for finding in findings if finding.location == change.location]
            lines = _join_lines(change.description, str(change.location))
            table.add_row(
                style_text(word) if pairs else style_text("not seen", "warn"), format_count(sum(pairs)), lines
            )
    for finding in result.unplanted_slowdowns:
        table.add_row(
            style_text("slower"),
            format_count(finding.count),
            _join_lines(CPU_COST_NOTE, _format_finding_location(finding)),
        )
    _print_titled_table(console, "Other differences, which are not regressions", table)


def _print_unexpected(console: Console, result: DemoResult) -> None:
    if result.unexpected_findings:
        table = make_table(
            "", "finding without a planted change", "pairs", "finding", numeric_columns=frozenset({"pairs", "finding"})
        )
        for finding in result.unexpected_findings:
            table.add_row(
                style_text("unexpected", "fail"),
                _format_finding_location(finding),
                format_count(finding.count),
                str(finding.id),
            )
        _print_titled_table(
            console, f"{format_quantity(len(result.unexpected_findings), 'finding')} without a planted change", table
        )


def _print_ledger(console: Console, result: DemoResult) -> None:
    ledger, tally = result.ledger, result.tally
    table = make_table("outcome", "requests", numeric_columns=frozenset({"requests"}))
    for outcome, pair_count in sorted(ledger.outcomes.items(), key=lambda row: -row[1]):
        table.add_row(style_text(outcome.replace("_", " "), outcome), format_count(pair_count))
        if outcome == "mismatch":
            table.add_row(style_text("  of these only noise or additions", "dim"), format_count(ledger.explained_pairs))
    table.add_row("sum", format_count(ledger.total_pairs))
    table.add_row("Envoy's count", "unknown" if ledger.envoy_sampled is None else format_count(ledger.envoy_sampled))
    _print_titled_table(console, "The ledger: " + _format_ledger_state(ledger), table)
    errors = style_text(format_quantity(tally.user_errors, "user error"), "fail" if tally.user_errors else "ok")
    console.print(f"{format_quantity(tally.requests, 'request')}, ", errors, sep="")


def _format_ledger_state(ledger: LedgerCounts) -> str:
    if ledger.is_settled(0):
        return "it holds every request that Envoy sampled"
    missing_text = "an unknown number of" if ledger.unaccounted is None else str(ledger.unaccounted)
    pending_text = "an unknown number" if ledger.pending is None else str(ledger.pending)
    return f"{missing_text} requests are missing, {pending_text} are pending"


def _print_next_commands(console: Console, outcome: DemoOutcome) -> None:
    address = outcome.stack.grpc_address
    flag = "" if address == f"{LOOPBACK}:{GRPC_PORT}" else f" --address {address}"
    console.print()
    console.print("Commands to try in another terminal", style="bold")
    for command, description in _list_next_commands(outcome):
        console.print(f"# {description}", style="dim", soft_wrap=True)
        console.print(f"{program_command()} {command}{flag}", soft_wrap=True)  # one line, to copy it
    console.print(f"or open {outcome.stack.http_url}", soft_wrap=True)


def program_command() -> str:
    """Return the shell words that start this program from the same folder."""
    program_path, installed_path = sys.argv[0], shutil.which("abreast")
    if Path(program_path).name != "abreast":
        return shlex.join([sys.executable, "-m", "abreast_sidecar"])
    return "abreast" if installed_path and Path(installed_path).samefile(program_path) else shlex.quote(program_path)


def _list_next_commands(outcome: DemoOutcome) -> Iterable[tuple[str, str]]:
    yield "findings", "differences, one row per cause"
    for finding, pair in outcome.example_pair_ids.items():
        yield f"finding {finding}", "one finding with examples"
        if pair:
            yield f"pair {pair}", "one request with both answers side by side"
    yield 'traffic set --new 50% --reason "a closer look"', "send half of the users to new"
    yield 'rollback --reason "yen prices"', "send all users to old at once"
    yield "watch", "findings as they arrive"


def _format_finding_location(finding: ReportedFinding) -> str:
    location = finding.location
    position = {"body": location.path, "header": f"header {location.path}", "latency": "time"}.get(
        location.part, location.part
    )
    return to_printable(f"{location.endpoint}  {position}: {finding.summary or location.kind}")


def _join_lines(first: str, second: str) -> Text:
    return Text.assemble(first, "\n", (second, "dim"))


def _print_titled_table(console: Console, title: str, titled_table: Table) -> None:
    console.print()
    console.print(title, style="bold")
    console.print(titled_table)
