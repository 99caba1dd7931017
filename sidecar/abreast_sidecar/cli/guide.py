"""What `abreast up` says once everything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abreast_sidecar.cli.connection import DEFAULT_ADDRESS
from abreast_sidecar.cli.humane import format_percent

if TYPE_CHECKING:
    from abreast_sidecar.embedded.stack import Stack
    from abreast_sidecar.envoy.settings import SocketAddress

STARTUP_TEMPLATE = """
everything runs for the service {service}

  users' requests  {envoy}   send them here, not to the versions
  old              {old}
  new              {new}
  page             {page}   what differs, in a browser
  mirrored         {safe} of GET, HEAD and OPTIONS requests, {unsafe} of others

In both versions, after `pip install abreast`:

  from abreast import ParallelRunMiddleware
  app.add_middleware(ParallelRunMiddleware)

and in their environment:

  ABREAST_SERVICE={service}
  ABREAST_REDIS_URL={redis}

Then, in another terminal{address}:

  abreast status     how the compared requests ended
  abreast findings   what differs
  abreast doctor     why nothing shows up

{kept} Ctrl-C stops everything.
"""


def format_startup_message(stack: Stack, data_dir: Path | None) -> str:
    settings = stack.envoy_settings
    address = (
        ""
        if stack.grpc_address == DEFAULT_ADDRESS
        else f", after `export ABREAST_SIDECAR={stack.grpc_address}`"
    )
    return STARTUP_TEMPLATE.format(
        service=settings.service,
        envoy=stack.envoy_url,
        old=_format_urls(settings.old, tls=bool(settings.old_tls)),
        new=_format_urls(settings.new, tls=bool(settings.new_tls)),
        safe=format_percent(settings.sample_safe),
        unsafe=format_percent(settings.sample_unsafe),
        redis=stack.redis_url,
        page=stack.http_url,
        address=address,
        kept=f"Data is kept in {data_dir}." if data_dir else "Nothing is kept; to keep it: --data DIR.",
    )


def _format_urls(endpoints: Sequence[SocketAddress], *, tls: bool) -> str:
    return ", ".join(
        f"{'https' if tls else 'http'}://{endpoint.host}:{endpoint.port}" for endpoint in endpoints
    )
