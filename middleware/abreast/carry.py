"""The role of a request on its way to another process, such as a worker that does its background work."""

from __future__ import annotations

import logging
from typing import get_args

import orjson

from abreast.capture import Role, Version
from abreast.context import CURRENT_CONTEXT, NO_REQUEST, RequestContext

logger = logging.getLogger("abreast")


def inject() -> str:
    """What to send along, for `adopt`. Empty outside a sampled request."""
    context = CURRENT_CONTEXT.get()
    if context is NO_REQUEST:
        return ""
    return orjson.dumps([context.version, context.role, context.pair, context.release]).decode()


def extract(carrier: str) -> None:
    """Be what the sender was, until the end of this task or thread, or until the next call. Never raises.

    Call it before each piece of work, also where nothing was carried: then the work is live. What is recorded here
    travels with no capture.
    """
    context, current_context = _parse_carrier(carrier) if carrier else NO_REQUEST, CURRENT_CONTEXT.get()
    is_same_request = context.pair and (
        current_context.pair,
        current_context.role,
        current_context.version,
    ) == (context.pair, context.role, context.version)
    if not is_same_request:  # in the process of the request it stays the request's own
        CURRENT_CONTEXT.set(context)


def _parse_carrier(carrier: str) -> RequestContext:
    try:
        version, role, pair, release = orjson.loads(carrier)
        if role in get_args(Role) and version in {*get_args(Version), None}:
            return RequestContext(version, role, str(pair), str(release))
    except (ValueError, TypeError):
        pass
    logger.error("work came with a role that can't be read, and counts as a shadow's: %.200s", carrier)
    return RequestContext(None, "shadow", "", "")
