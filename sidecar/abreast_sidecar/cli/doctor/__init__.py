"""`abreast doctor`: a module per part reads facts first, and then makes checks of them.

This module has the result of all parts, `run` the command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

CheckState = Literal["ok", "warn", "fail"]


class UnreachableError(Exception):
    """A part does not answer. The message is the reason, in lower case."""


@dataclass(frozen=True)
class Check:
    """`found` describes the observation, and `advice` the action to take: empty if the state is ok."""

    part: str
    name: str
    state: CheckState
    found: str
    advice: str = ""


@dataclass(frozen=True)
class CheckFactory:
    """Makes the checks of one part."""

    part: str

    def make(self, name: str, observation: str, advice: str = "", *, fails: bool = False, warns: bool = False) -> Check:
        """Return a check that fails or warns if the condition is true. Otherwise it is ok, and needs no advice."""
        if fails or warns:
            return Check(self.part, name, "fail" if fails else "warn", observation, advice)
        return Check(self.part, name, "ok", observation)


def mask_password(url: str) -> str:
    """Return scheme://host:port/path of a URL. Other text, such as a list of hosts, is not shown at all."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the given address"
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}" if parts.hostname else "the given address"
