"""From Redis: reads ready pairs, takes over what dead workers left, gives up pairs that stay incomplete."""

from abreast_sidecar.read.client import connect_redis, map_redis_errors
from abreast_sidecar.read.consumers import delete_idle_consumers
from abreast_sidecar.read.entry import StreamEntry
from abreast_sidecar.read.reader import StreamConsumer
from abreast_sidecar.read.shards import list_shards
from abreast_sidecar.read.sweep import expire_incomplete_pairs

__all__ = [
    "StreamConsumer",
    "StreamEntry",
    "connect_redis",
    "delete_idle_consumers",
    "expire_incomplete_pairs",
    "list_shards",
    "map_redis_errors",
]
