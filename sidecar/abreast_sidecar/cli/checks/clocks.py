"""Do the clocks agree? Windows of time and timelines go by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from abreast_sidecar.cli.checks.check import Check, Part
from abreast_sidecar.cli.humane import seconds

CLOCKS = Part("clocks")
ALLOWED = 2.0  # seconds


def judge(ahead: Mapping[str, float]) -> Iterator[Check]:
    """`ahead`: by how many seconds each clock is ahead of this machine's."""
    off = {name: value for name, value in ahead.items() if abs(value) > ALLOWED}
    if not ahead:
        return
    if not off:
        widest = max(abs(value) for value in ahead.values())
        yield CLOCKS.ok("agree", f"{', '.join(ahead)} within {seconds(max(widest, 0.001))} of this machine's")
    for name, value in off.items():
        found = f"{name}'s is {seconds(abs(value))} {'ahead of' if value > 0 else 'behind'} this machine's"
        yield CLOCKS.warn(
            name, found, "synchronise the clocks (chrony, ntpd): times of requests will look odd"
        )
