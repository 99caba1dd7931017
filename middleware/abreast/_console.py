"""The console script. If only the middleware is installed, it names the package to install."""

import os
import signal
import sys

SERVERS = ("up", "demo", "sidecar", "faults")  # commands that SIGTERM ends successfully
# fmt: off
SIDECAR_PACKAGES = {
    "click", "grpc", "google", "jinja2", "psycopg", "rich", "starlette", "structlog", "uvicorn", "yaml", "zstandard",
}
# fmt: on


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SERVERS:  # until the command handles the signal: nothing runs yet
        signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    try:
        from abreast_sidecar.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SIDECAR_PACKAGES:
            raise
        sys.exit("abreast: the command line needs more packages; run: pip install 'abreast[sidecar]'")
    run()
