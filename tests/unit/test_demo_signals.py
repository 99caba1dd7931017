"""What ends the demo, wherever it was started."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's `&` has it
from abreast_demo import run
run._treat_signals_as_interrupt()
try:
    signal.raise_signal(signal.{name})
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_demo_in_the_background_of_a_script_can_be_ended(name: str) -> None:
    code = RUN.format(name=name)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stdout) == (0, "stopped\n"), ended.stderr
