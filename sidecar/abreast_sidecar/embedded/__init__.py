"""Servers that Abreast starts by itself, for `abreast up`, the demo and the tests."""

from abreast_sidecar.embedded.envoy import EnvoyServer, find_envoy_binary
from abreast_sidecar.embedded.postgres import PostgresServer
from abreast_sidecar.embedded.process import ServerProcess, find_free_port
from abreast_sidecar.embedded.redis import RedisServer

__all__ = [
    "EnvoyServer",
    "PostgresServer",
    "RedisServer",
    "ServerProcess",
    "find_envoy_binary",
    "find_free_port",
]
