"""Evaluates an entry of the stream: decodes its captures, compares them, and makes a record for the ledger.

Suspect entries are evaluated in a separate process, because they may crash or hang it. This process runs
`serve_evaluations`. Both directions carry pickles, each after its length (8 bytes).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from abreast.errors import CaptureError
from abreast.protocol.capture import Capture, decode, merge_times
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import locate_error
from abreast_sidecar.ingest.stream import StreamEntry
from abreast_sidecar.store.records import PairRecord

NO_CAPTURE_REASON = "redis has no capture of it any more"
MAX_CLOCK_LEAD_MS = 300_000
MIN_SUSPECT_DELIVERIES = 3  # two workers received the entry before, and neither wrote it to the ledger
COMPARE_TIMEOUT_S = 30.0  # for one entry
LENGTH_PREFIX_BYTES = 8
SERVE_COMMAND = "from abreast_sidecar.ingest.evaluate import serve_evaluations; serve_evaluations()"


def evaluate_entry(entry: StreamEntry, rules: CompareOptions) -> PairRecord:
    """Compare an entry. Never raise: an entry that can't be read or compared becomes an `undecodable` record."""
    try:
        return _evaluate(entry, rules)
    except Exception as error:  # noqa: BLE001  # one entry must not stop the stream
        return undecodable_record(entry, f"its comparison raised {locate_error(error)}")


def _evaluate(entry: StreamEntry, rules: CompareOptions) -> PairRecord:
    captures, reason = [], ""
    for blob in entry.blobs:
        try:
            captures.append(decode(blob))
        except CaptureError as error:
            reason = str(error)
    captures = merge_times(captures)
    if not captures:
        return undecodable_record(entry, reason or NO_CAPTURE_REASON)
    result = compare_pair(captures, rules, timed_out=entry.ready_reason == "timed_out")
    if reason:
        return undecodable_record(entry, reason, result)
    if entry.ready_reason == "late":
        result = replace(
            result, outcome="late", reason=f"the capture of {captures[0].version} arrived after the deadline"
        )
    time_ms = _choose_time_ms(entry.time_ms, captures)
    return PairRecord(entry.keys.service, entry.id, time_ms, entry.pair_id, result, entry.blobs)


def undecodable_record(entry: StreamEntry, reason: str, partial_result: ComparisonResult | None = None) -> PairRecord:
    """Return a record with the content of the entry, and with what `partial_result` tells about it."""
    source = partial_result or ComparisonResult("undecodable", method="", route="")
    result = ComparisonResult(
        "undecodable",
        source.method,
        source.route,
        source.old,
        source.new,
        reason=reason,
        route_source=source.route_source,
    )
    service, content = entry.keys.service, b"\n".join(entry.blobs)
    return PairRecord(service, entry.id, entry.time_ms, entry.pair_id, result, entry.blobs, dead_letter=content)


def _choose_time_ms(entry_ms: int, captures: Sequence[Capture]) -> int:
    """Return the time of a pair: by Redis's clock, unless it is in the future and the services' clocks are not.

    A Redis clock that was set forward keeps numbering entries from there, even after it was corrected. A second delivery
    gets the same time.
    """
    if entry_ms <= time.time() * 1000 + MAX_CLOCK_LEAD_MS:
        return entry_ms
    started_ms = max(capture.started_at for capture in captures) * 1000
    return int(started_ms) if 0 < started_ms < entry_ms - MAX_CLOCK_LEAD_MS else entry_ms


class IsolatedComparer:
    """Starts the process when needed, and again after it ended."""

    def __init__(self, timeout_s: float = COMPARE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: Process | None = None

    async def compare(self, entry: StreamEntry, rules: CompareOptions) -> PairRecord:
        """Compare an entry. If it crashes or hangs the process, return an `undecodable` record."""
        process = self._process = self._process or await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVE_COMMAND, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await _request(process, (entry, rules))
        except TimeoutError:
            reason = f"its comparison took more than {self._timeout_s:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await process.wait()
            exit_text = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            reason = f"its comparison ended the process ({exit_text})"
        except Exception as error:  # noqa: BLE001  # for example a result that can't be unpickled
            reason = f"its comparison raised {locate_error(error)}"
        await self.close()
        return undecodable_record(entry, f"{reason}; it was delivered {entry.delivery_count} times")

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def _request(process: Process, payload: Any) -> PairRecord:
    assert process.stdin is not None
    assert process.stdout is not None
    content = pickle.dumps(payload)
    process.stdin.write(len(content).to_bytes(LENGTH_PREFIX_BYTES) + content)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_PREFIX_BYTES))
    record: PairRecord = pickle.loads(await process.stdout.readexactly(length))  # noqa: S301  # our own process
    return record


def serve_evaluations() -> None:
    """Serve until the input ends, so that the process never outlives the worker."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep prints out of the results
    with contextlib.suppress(EOFError, BrokenPipeError):
        while len(length := sys.stdin.buffer.read(LENGTH_PREFIX_BYTES)) == LENGTH_PREFIX_BYTES:
            content = sys.stdin.buffer.read(int.from_bytes(length))
            entry, rules = pickle.loads(content)  # noqa: S301  # from our parent
            content = pickle.dumps(evaluate_entry(entry, rules))
            output.write(len(content).to_bytes(LENGTH_PREFIX_BYTES) + content)
            output.flush()
