"""Compares suspect entries in a separate process, because they may crash or hang it.

The process is `python -m abreast_sidecar.ingest.isolated`. Both directions carry pickles, each after its length (8 bytes).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any, BinaryIO

from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import evaluate_entry, undecodable_record
from abreast_sidecar.ingest.stream import StreamEntry
from abreast_sidecar.store.records import PairRecord

MIN_SUSPECT_DELIVERIES = 3  # two workers received the entry before, and neither wrote it to the ledger
COMPARE_TIMEOUT_S = 30.0  # for one entry
LENGTH_PREFIX_BYTES = 8


class IsolatedComparer:
    """Starts the process when needed, and again after it ended."""

    def __init__(self, timeout_s: float = COMPARE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: Process | None = None

    async def compare(self, entry: StreamEntry, rules: CompareOptions) -> PairRecord:
        """Compare an entry. If it crashes or hangs the process, return an `undecodable` record."""
        process = self._process = self._process or await _start_process()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await _request(process, (entry, rules))
        except TimeoutError:
            reason = f"its comparison took more than {self._timeout_s:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            reason = f"its comparison ended the process ({_describe_exit(await process.wait())})"
        await self.close()
        return undecodable_record(entry, f"{reason}; it was delivered {entry.delivery_count} times")

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def _start_process() -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "abreast_sidecar.ingest.isolated", stdin=PIPE, stdout=PIPE, start_new_session=True
    )


async def _request(process: Process, payload: Any) -> PairRecord:
    assert process.stdin is not None
    assert process.stdout is not None
    content = pickle.dumps(payload)
    process.stdin.write(len(content).to_bytes(LENGTH_PREFIX_BYTES) + content)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_PREFIX_BYTES))
    record: PairRecord = pickle.loads(await process.stdout.readexactly(length))  # noqa: S301  # our own process
    return record


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def main() -> None:
    """Serve until the input ends, so that the process never outlives the worker."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep prints out of the results
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            entry, rules = pickle.loads(_read_message(sys.stdin.buffer))  # noqa: S301  # from our parent
            content = pickle.dumps(evaluate_entry(entry, rules))
            output.write(len(content).to_bytes(LENGTH_PREFIX_BYTES) + content)
            output.flush()


def _read_message(stream: BinaryIO) -> bytes:
    length = stream.read(LENGTH_PREFIX_BYTES)
    if len(length) < LENGTH_PREFIX_BYTES:
        raise EOFError
    return stream.read(int.from_bytes(length))


if __name__ == "__main__":
    main()
