"""The role of a request on its way to another process, such as a worker that does its background work."""

from __future__ import annotations

import logging
from typing import get_args

import orjson

from abreast.capture import Role, Version
from abreast.context import CURRENT, OUTSIDE, Current

logger = logging.getLogger("abreast")


def carry() -> str:
    """What to send along, for `adopt`. Empty outside a sampled request."""
    now = CURRENT.get()
    if now is OUTSIDE:
        return ""
    return orjson.dumps([now.version, now.role, now.pair, now.release]).decode()


def adopt(carried: str) -> None:
    """Be what the sender was, until the end of this task or thread, or until the next call. Never raises.

    Call it before each piece of work, also where nothing was carried: then the work is live. What is recorded here
    travels with no capture.
    """
    now, here = _read(carried) if carried else OUTSIDE, CURRENT.get()
    same = now.pair and (here.pair, here.role, here.version) == (now.pair, now.role, now.version)
    if not same:  # in the process of the request it stays the request's own
        CURRENT.set(now)


def _read(carried: str) -> Current:
    try:
        version, role, pair, release = orjson.loads(carried)
        if role in get_args(Role) and version in {*get_args(Version), None}:
            return Current(version, role, str(pair), str(release))
    except (ValueError, TypeError):
        pass
    logger.error("work came with a role that can't be read, and counts as a shadow's: %.200s", carried)
    return Current(None, "shadow", "", "")
