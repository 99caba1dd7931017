"""From Redis: reads ready pairs, takes over what dead workers left, gives up pairs that stay incomplete."""

from abreast_sidecar.read.client import connect, translated
from abreast_sidecar.read.consumers import forget_consumers
from abreast_sidecar.read.entry import Entry
from abreast_sidecar.read.reader import Reader
from abreast_sidecar.read.shards import shards
from abreast_sidecar.read.sweep import sweep

__all__ = ["Entry", "Reader", "connect", "forget_consumers", "shards", "sweep", "translated"]
