"""gRPC's fork handlers are off: they can crash a server process that a command starts."""

from __future__ import annotations

import os
import subprocess
import sys


def test_cli_disables_fork_handlers_of_grpc() -> None:
    script = "import abreast_sidecar.cli, os; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )

    assert process.stdout == "0\n"
