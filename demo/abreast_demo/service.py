"""The process of one version: `python -m abreast_demo.service --version old --listen HOST:PORT [--plain]`."""

from __future__ import annotations

import argparse
import os
import sys

import uvicorn
from starlette.applications import Starlette

from abreast import ParallelRunMiddleware
from abreast_demo.shop import RELEASE_BY_VERSION, SHOP_SERVICE, FaultMiddleware, Shop

SHUTDOWN_GRACE_S = 3


def build_app(version: str, shop: Shop, *, has_middleware: bool) -> Starlette:
    if version == "old":
        from abreast_demo import old

        app = old.build_starlette_app(shop)
    else:
        from abreast_demo import new

        app = new.build_fastapi_app(shop)
    app.add_middleware(FaultMiddleware)
    if has_middleware:
        app.add_middleware(ParallelRunMiddleware, service=SHOP_SERVICE)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m abreast_demo.service", description="Run one version of the shop.")
    parser.add_argument("--version", choices=("old", "new"), required=True)
    parser.add_argument("--listen", metavar="HOST:PORT", required=True)
    parser.add_argument("--plain", action="store_true", help="without the middleware: Envoy captures this version")
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    missing_variables = [name for name in ("DATABASE_URL", "CACHE_URL") if not os.environ.get(name)]
    if missing_variables:
        sys.exit(f"shop: set {' and '.join(missing_variables)}")
    if not port.isdigit():
        sys.exit(f"shop: --listen must be HOST:PORT, got '{arguments.listen}'")
    os.environ.setdefault("ABREAST_RELEASE", RELEASE_BY_VERSION[arguments.version])
    FaultMiddleware.install_signal_handlers()
    shop = Shop(os.environ["DATABASE_URL"], os.environ["CACHE_URL"])
    app = build_app(arguments.version, shop, has_middleware=not arguments.plain)
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
