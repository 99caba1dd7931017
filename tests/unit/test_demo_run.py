from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # like a script's `&`
from abreast_demo import run
run._treat_signals_as_interrupt()
try:
    signal.raise_signal(signal.{name})
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_demo_in_the_background_of_a_script_ends_on_signals(name: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(name=name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (result.returncode, result.stdout) == (0, "stopped\n"), result.stderr
