"""The connection of one event loop to Redis. Each call has a timeout, and raises only TransportError."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec import json
from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from abreast.errors import AbreastError
from abreast.protocol.join import JOIN_SCRIPT, SERVICES_KEY, CaptureRow, Keys, join_arguments, join_command, reports_key
from abreast.protocol.redis_client import connect, disconnect, is_cluster
from abreast.settings import Settings

REPLY_TIMEOUT_S = 0.25
CONNECT_TIMEOUT_S = 1.0
JOIN_SCRIPT_SHA = hashlib.sha1(JOIN_SCRIPT.encode(), usedforsecurity=False).hexdigest()
# Errors that depend on the state of Redis and not on the command. redis-py has classes for some of them.
# fmt: off
TRANSIENT_ERRORS = (
    "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "OOM ", "READONLY", "UNKILLABLE",
)
TRANSIENT_ERROR_TYPES = (
    exceptions.AskError,  # includes MovedError
    exceptions.ClusterDownError, exceptions.NoPermissionError, exceptions.OutOfMemoryError, exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
# fmt: on


class TransportError(AbreastError):
    """Redis can't be reached or refuses a command. If `is_transient`, a retry may help."""

    def __init__(self, message: str, *, is_transient: bool) -> None:
        super().__init__(message)
        self.is_transient = is_transient


class JoinResult(NamedTuple):
    """The number of captures of a batch by result."""

    received: int
    duplicate: int
    late: int
    rejected_pairs: int
    rejected_bytes: int


class RawCommand(bytes):
    """A command in the protocol of Redis."""


def _make_raw_connection(connection: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a subclass of the connection that sends a RawCommand unchanged."""

    class RawConnection(connection):  # type: ignore[misc, valid-type]
        def pack_command(self, *args: Any) -> list[bytes]:
            command = args[-1]
            return [command] if isinstance(command, RawCommand) else super().pack_command(*args)

    return RawConnection


class RedisTransport:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = connect(settings.redis_url, timeout=REPLY_TIMEOUT_S, connect_timeout=CONNECT_TIMEOUT_S)
        self._is_cluster = is_cluster(self._client)  # a cluster client must see the keys
        if not self._is_cluster:
            pool = self._client.connection_pool
            pool.connection_class = _make_raw_connection(pool.connection_class)

    async def open(self) -> None:
        """Connect, and register the service."""
        await self._register()

    async def join(self, shard: int, rows: Sequence[CaptureRow]) -> JoinResult:
        """Send encoded captures of one shard. Sending a batch twice changes nothing."""
        keys, limits = Keys(self._settings.service, shard), self._settings.join_limits
        try:
            if not self._is_cluster:
                command = RawCommand(join_command(JOIN_SCRIPT_SHA, keys, limits, rows))
                return JoinResult(*await self._call("EVALSHA", command))
            names, arguments = join_arguments(keys, limits, rows)
            return JoinResult(*await self._call("EVALSHA", JOIN_SCRIPT_SHA, len(names), *names, *arguments))
        except TransportError as error:
            if not isinstance(error.__cause__, exceptions.NoScriptError):
                raise
            names, arguments = join_arguments(keys, limits, rows)
            return JoinResult(*await self._call("EVAL", JOIN_SCRIPT, len(names), *names, *arguments))

    async def report(self, process: str, report: dict[str, Any]) -> None:
        """Store a report. Also register the service, because Redis may have been emptied."""
        await self._register()
        await self._call("HSET", reports_key(self._settings.service), process, json.encode(report))

    async def _register(self) -> None:
        await self._call("HSET", SERVICES_KEY, self._settings.service, self._settings.shards)

    async def close(self) -> None:
        """Close the sockets at once, even if replies are outstanding."""
        await disconnect(self._client)

    async def _call(self, name: str, *arguments: str | int | bytes) -> Any:
        try:
            return await self._client.execute_command(name, *arguments)  # type: ignore[no-untyped-call]
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            raise TransportError(f"Redis can't be reached: {error}", is_transient=True) from error
        except exceptions.ResponseError as error:
            message = str(error)
            is_transient = isinstance(error, TRANSIENT_ERROR_TYPES) or any(word in message for word in TRANSIENT_ERRORS)
            raise TransportError(f"Redis refuses {name}: {message}", is_transient=is_transient) from error
        except (exceptions.RedisError, OSError) as error:
            raise TransportError(f"Redis can't be used: {error}", is_transient=True) from error
