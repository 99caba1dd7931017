"""What a run looks like to a person."""

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

from abreast_demo.load import Tally
from abreast_demo.plants import ADDITIVE, HEAVIER, NOISE, REGRESSIONS
from abreast_demo.ports import LOOPBACK
from abreast_demo.run import GRPC_PORT, Finished, Options
from abreast_demo.verdict import Ledger, Result, Seen
from abreast_sidecar.cli.humane import count, counted, percent, printable
from abreast_sidecar.cli.tables import styled, table
from abreast_sidecar.embedded.stack import Stack


class Show:
    """Use as a context manager. Without `results` only what goes on is told."""

    def __init__(self, console: Console, *, results: bool) -> None:
        self.console = console
        self.results = results
        self._progress: Progress | None = None
        self._bar = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_progress()

    def say(self, text: str) -> None:
        self._end_progress()
        self.console.print(text, style="dim", soft_wrap=True)

    def wait(self, text: str) -> None:
        """Print a step, on a terminal with the seconds it takes until the next output."""
        if not self.console.is_terminal:
            self.say(text)
            return
        self._end_progress()
        columns = (TextColumn("{task.description}", style="dim"), TimeElapsedColumn())
        # A timer signal instead of a thread: servers are forked meanwhile.
        self._progress = progress = Progress(*columns, console=self.console, auto_refresh=False)
        progress.add_task(text, total=None)
        progress.start()
        signal.signal(signal.SIGALRM, lambda _number, _frame: progress.refresh())
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)

    def ready(self, stack: Stack, options: Options) -> None:
        self._end_progress()
        self.console.print(f"the shop: {stack.envoy_url}/catalogue/categories", soft_wrap=True)
        self.console.print(f"abreast:  {stack.http_url}", soft_wrap=True)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[requests]:,} requests, {task.fields[errors]:,} user errors"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar = self._progress.add_task("", total=options.seconds, requests=0, errors=0)
            self._progress.start()

    def step(self, share: float) -> None:
        text = f"new answers {percent(share)} of users" if share else "old answers all users"
        if self._progress is None:
            self.console.print(text, style="dim")
        else:
            self._progress.update(self._bar, description=text)

    def progress(self, tally: Tally) -> None:
        if self._progress is not None:
            passed = self._progress.tasks[self._bar].elapsed or 0.0
            self._progress.update(
                self._bar, completed=passed, requests=tally.requests, errors=tally.user_errors
            )

    def regression(self, seen: Seen) -> None:
        self.console.print(styled("found", "ok"), "", _place(seen), soft_wrap=True)

    def finished(self, finished: Finished) -> None:
        self._end_progress()
        if self.results:
            for part in (_planted, _harmless, _unexpected, _sums):
                part(self.console, finished.result)
            _next_commands(self.console, finished)

    def _end_progress(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _planted(console: Console, result: Result) -> None:
    rows = table(
        "", "finding", "pairs", "planted, and what is reported", right=frozenset({"finding", "pairs"})
    )
    for plant in REGRESSIONS:
        shown = [one for one in result.regressions if one.place == plant.place]
        for one in shown:
            rows.add_row(
                styled("found", "ok"), str(one.id), count(one.count), _two_lines(plant.what, _place(one))
            )
        if not shown:
            rows.add_row(styled("missed", "fail"), "", "", _two_lines(plant.what, str(plant.place)))
    _titled(console, f"Regressions: {len(result.found)} of {len(REGRESSIONS)} found", rows)


def _harmless(console: Console, result: Result) -> None:
    rows = table("", "pairs", "harmless, and where it was seen", right=frozenset({"pairs"}))
    for plants, seen, word in ((NOISE, result.noise, "noise"), (ADDITIVE, result.additive, "additive")):
        for plant in plants:
            pairs = [one.count for one in seen if one.place == plant.place]
            lines = _two_lines(plant.what, str(plant.place))
            rows.add_row(styled(word) if pairs else styled("not seen", "warn"), count(sum(pairs)), lines)
    for one in result.heavier:
        rows.add_row(styled("slower"), count(one.count), _two_lines(HEAVIER, _place(one)))
    _titled(console, "Differs too, and is no regression", rows)


def _unexpected(console: Console, result: Result) -> None:
    if result.unexpected:
        rows = table(
            "", "reported, but not planted", "pairs", "finding", right=frozenset({"pairs", "finding"})
        )
        for one in result.unexpected:
            rows.add_row(styled("unexpected", "fail"), _place(one), count(one.count), str(one.id))
        _titled(console, f"{counted(len(result.unexpected), 'finding')} that nobody planted", rows)


def _sums(console: Console, result: Result) -> None:
    ledger, tally = result.ledger, result.tally
    rows = table("outcome", "requests", right=frozenset({"requests"}))
    for outcome, number in sorted(ledger.outcomes.items(), key=lambda row: -row[1]):
        rows.add_row(styled(outcome.replace("_", " "), outcome), count(number))
        if outcome == "mismatch":
            rows.add_row(styled("  of these only noise or additions", "dim"), count(ledger.explained))
    rows.add_row("sum", count(ledger.rows))
    rows.add_row("Envoy's own count", "unknown" if ledger.envoy is None else count(ledger.envoy))
    _titled(console, "The ledger: " + _verdict(ledger), rows)
    errors = styled(counted(tally.user_errors, "user error"), "fail" if tally.user_errors else "ok")
    console.print(f"{counted(tally.requests, 'request')}, ", errors, sep="")


def _verdict(ledger: Ledger) -> str:
    if ledger.settled(0):
        return "it sums up to what Envoy counted"
    missing = "an unknown number of" if ledger.unaccounted is None else str(ledger.unaccounted)
    waiting = "an unknown number" if ledger.pending is None else str(ledger.pending)
    return f"{missing} requests are not in it, {waiting} still wait"


def _next_commands(console: Console, finished: Finished) -> None:
    address = finished.stack.grpc_address
    flag = "" if address == f"{LOOPBACK}:{GRPC_PORT}" else f" --address {address}"
    console.print()
    console.print("What to try next, in another terminal", style="bold")
    for command, why in _commands(finished):
        console.print(f"# {why}", style="dim", soft_wrap=True)
        console.print(f"{program()} {command}{flag}", soft_wrap=True)  # one line, to be copied
    console.print(f"or open {finished.stack.http_url}", soft_wrap=True)


def program() -> str:
    """The word or words that start this program again, for a shell in the same folder."""
    called, found = sys.argv[0], shutil.which("abreast")
    if Path(called).name != "abreast":
        return shlex.join([sys.executable, "-m", "abreast_sidecar"])
    return "abreast" if found and Path(found).samefile(called) else shlex.quote(called)


def _commands(finished: Finished) -> Iterable[tuple[str, str]]:
    yield "findings", "what differs, one cause a row"
    for finding, pair in finished.examples.items():
        yield f"finding {finding}", "one of them, with examples"
        if pair:
            yield f"pair {pair}", "one request: both answers side by side"
    yield 'traffic set --new 50% --reason "a closer look"', "new answers half of the users"
    yield 'rollback --reason "yen prices"', "old answers all of them, at once"
    yield "watch", "findings as they grow"


def _place(one: Seen) -> str:
    place = one.place
    where = {"body": place.path, "header": f"header {place.path}", "latency": "time"}.get(
        place.part, place.part
    )
    return printable(f"{place.endpoint}  {where}: {one.summary or place.kind}")


def _two_lines(first: str, second: str) -> Text:
    return Text.assemble(first, "\n", (second, "dim"))


def _titled(console: Console, title: str, rows: Table) -> None:
    console.print()
    console.print(title, style="bold")
    console.print(rows)
