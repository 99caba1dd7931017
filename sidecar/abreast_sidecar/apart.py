"""Compares in a process of its own what workers were given again and again: comparing it may end or hang a process.

The process is python -m abreast_sidecar.apart: it reads and writes pickles, each after its length (8 bytes).
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

from abreast_sidecar.compare import Rules
from abreast_sidecar.judging import judged, undecodable
from abreast_sidecar.read import Entry
from abreast_sidecar.store import Judged

SUSPECT = 3  # deliveries: two workers had it before and did not get it into the ledger
LONGEST = 30.0  # seconds for one entry
LENGTH = 8  # bytes


class Apart:
    """Starts the process when it is needed, and anew when it ended."""

    def __init__(self, longest: float = LONGEST) -> None:
        self._longest = longest
        self._process: Process | None = None

    async def judged(self, entry: Entry, rules: Rules) -> Judged:
        """Never raises for what the entry does: it is put apart then, with the reason."""
        process = self._process = self._process or await _start()
        try:
            async with asyncio.timeout(self._longest):
                return await _ask(process, (entry, rules))
        except TimeoutError:
            reason = f"comparing it took more than {self._longest:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            reason = f"comparing it ends the process ({_end(await process.wait())})"
        await self.close()
        return undecodable(entry, f"{reason}; it was given to workers {entry.deliveries} times")

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def _start() -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "abreast_sidecar.apart", stdin=PIPE, stdout=PIPE, start_new_session=True
    )


async def _ask(process: Process, question: Any) -> Judged:
    assert process.stdin is not None
    assert process.stdout is not None
    content = pickle.dumps(question)
    process.stdin.write(len(content).to_bytes(LENGTH) + content)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH))
    answer: Judged = pickle.loads(await process.stdout.readexactly(length))  # noqa: S301  # our own process
    return answer


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def main() -> None:
    """Until the input ends, so that it never outlives the worker."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anyone prints must not get among the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            entry, rules = pickle.loads(_read(sys.stdin.buffer))  # noqa: S301  # our own parent
            content = pickle.dumps(judged(entry, rules))
            answers.write(len(content).to_bytes(LENGTH) + content)
            answers.flush()


def _read(stream: BinaryIO) -> bytes:
    length = stream.read(LENGTH)
    if len(length) < LENGTH:
        raise EOFError
    return stream.read(int.from_bytes(length))


if __name__ == "__main__":
    main()
