"""The process of one version: `python -m abreast_demo.service --version old --listen HOST:PORT`."""

from __future__ import annotations

import argparse
import os
import sys

import uvicorn
from starlette.types import ASGIApp

from abreast import ParallelRunMiddleware
from abreast_demo.shop import RELEASE_BY_VERSION, SHOP_SERVICE, FaultMiddleware, Shop

SHUTDOWN_GRACE_S = 3


def build_app(version: str, shop: Shop) -> ASGIApp:
    if version == "old":
        from abreast_demo import old

        starlette = old.build_starlette_app(shop)
        starlette.add_middleware(FaultMiddleware)
        starlette.add_middleware(ParallelRunMiddleware, service=SHOP_SERVICE)
        return starlette
    from abreast_demo import new

    fastapi = new.build_fastapi_app(shop)
    fastapi.add_middleware(FaultMiddleware)
    fastapi.add_middleware(ParallelRunMiddleware, service=SHOP_SERVICE)
    return fastapi


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m abreast_demo.service", description="Run one version of the shop.")
    parser.add_argument("--version", choices=("old", "new"), required=True)
    parser.add_argument("--listen", metavar="HOST:PORT", required=True)
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    missing_variables = [name for name in ("DATABASE_URL", "CACHE_URL") if not os.environ.get(name)]
    if missing_variables:
        sys.exit(f"shop: set {' and '.join(missing_variables)}")
    if not port.isdigit():
        sys.exit(f"shop: --listen must be HOST:PORT, got '{arguments.listen}'")
    os.environ.setdefault("ABREAST_RELEASE", RELEASE_BY_VERSION[arguments.version])
    FaultMiddleware.install_signal_handlers()
    app = build_app(arguments.version, Shop(os.environ["DATABASE_URL"], os.environ["CACHE_URL"]))
    uvicorn.run(
        app,
        host=host,
        port=int(port),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )


if __name__ == "__main__":
    main()
