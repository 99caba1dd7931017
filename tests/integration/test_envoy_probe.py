"""Detection of the protocol that a version speaks."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from abreast_sidecar.cli.up import UpSettings, adapt_to_protocol
from abreast_sidecar.envoy.probe import HTTP_1, HTTP_2, probe_protocol
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.errors import SettingError
from support import find_free_port
from support_upstream import Upstream


async def test_protocol_is_that_of_the_service() -> None:
    grpc_server = grpc.aio.server()
    grpc_address = SocketAddress("127.0.0.1", grpc_server.add_insecure_port("127.0.0.1:0"))
    await grpc_server.start()
    async with Upstream() as upstream:
        http_address = SocketAddress("127.0.0.1", upstream.port)
        closed_address = SocketAddress("127.0.0.1", find_free_port())
        addresses = (http_address, grpc_address, closed_address)
        protocols = [await asyncio.to_thread(probe_protocol, address, "/healthz") for address in addresses]
        same = await asyncio.to_thread(adapt_to_protocol, UpSettings(old=(grpc_address,), new=(grpc_address,)))
        unknown = await asyncio.to_thread(adapt_to_protocol, UpSettings(old=(http_address,), new=(closed_address,)))
        with pytest.raises(SettingError) as error:
            await asyncio.to_thread(adapt_to_protocol, UpSettings(old=(http_address,), new=(grpc_address,)))
    await grpc_server.stop(None)

    assert protocols == [HTTP_1, HTTP_2, ""]
    assert (same.upstream_http2, same.health_path) == (True, "tcp")
    assert (unknown.upstream_http2, unknown.health_path) == (False, "/healthz")
    assert f"old at {http_address} speaks HTTP/1.1, new at {grpc_address} speaks HTTP/2" in str(error.value)
