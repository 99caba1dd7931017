"""Connections to Redis, and its errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import redis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from abreast_sidecar.errors import RedisError

BLOCK = 1000  # ms that a read waits for entries
SOCKET_TIMEOUT = 5.0  # seconds; above BLOCK, or each quiet second would look like a failure
CONNECT_TIMEOUT = 2.0  # seconds


def connect(url: str) -> Redis:
    """Opens nothing yet. Nothing is tried again by the client: the callers know what may be."""
    return Redis.from_url(
        url,
        socket_timeout=SOCKET_TIMEOUT,
        socket_connect_timeout=CONNECT_TIMEOUT,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


def script(name: str) -> str:
    return (resources.files("abreast_sidecar.read") / f"{name}.lua").read_text()


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RedisError(f"redis can't be used, check ABREAST_REDIS_URL and the server: {said}") from error
