"""One thing that doctor looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

CheckState = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """`found` is what was seen; `advice` what to do about it, empty where all is well."""

    part: str
    name: str
    state: CheckState
    found: str
    advice: str = ""


def mask_password(url: str) -> str:
    """scheme://host:port/path of a URL. A list of hosts, or what is no URL, is not shown at all."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the given address"
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}" if parts.hostname else "the given address"


class UnreachableError(Exception):
    """A part of the system does not answer; the message says how."""


@dataclass(frozen=True)
class CheckFactory:
    """Makes checks of one part."""

    name: str

    def ok(self, name: str, observation: str) -> Check:
        return Check(self.name, name, "ok", observation)

    def warn(self, name: str, observation: str, advice: str) -> Check:
        return Check(self.name, name, "warn", observation, advice)

    def fail(self, name: str, observation: str, advice: str) -> Check:
        return Check(self.name, name, "fail", observation, advice)
