"""The console script. If only the middleware is installed, it names the package to install."""

import sys

SIDECAR_PACKAGES = {
    "click",
    "grpc",
    "google",
    "jinja2",
    "psycopg",
    "rich",
    "starlette",
    "structlog",
    "uvicorn",
    "yaml",
    "zstandard",
}


def main() -> None:
    try:
        from abreast_sidecar.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SIDECAR_PACKAGES:
            raise
        sys.exit("abreast: the command line needs more packages; run: pip install 'abreast[sidecar]'")
    run()
