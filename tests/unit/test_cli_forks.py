"""Commands start servers while gRPC's threads run."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_handlers_of_grpc_for_forks_are_off_in_every_command() -> None:
    """They can crash the new process before it becomes the server."""
    script = "import abreast_sidecar.cli, os; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout == "0\n"
