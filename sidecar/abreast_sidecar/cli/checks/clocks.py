"""Do the clocks agree? Windows of time and timelines go by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from abreast_sidecar.cli.checks.check import Check, CheckFactory
from abreast_sidecar.cli.humane import format_seconds

CLOCK_CHECKS = CheckFactory("clocks")
MAX_CLOCK_OFFSET_S = 2.0  # seconds


def check_clocks(clock_offsets_s: Mapping[str, float]) -> Iterator[Check]:
    """`ahead`: by how many seconds each clock is ahead of this machine's."""
    deviations_s = {name: value for name, value in clock_offsets_s.items() if abs(value) > MAX_CLOCK_OFFSET_S}
    if not clock_offsets_s:
        return
    if not deviations_s:
        max_offset_s = max(abs(value) for value in clock_offsets_s.values())
        yield CLOCK_CHECKS.ok(
            "agree",
            f"{', '.join(clock_offsets_s)} within {format_seconds(max(max_offset_s, 0.001))} of this machine's",
        )
    for name, value in deviations_s.items():
        observation = (
            f"{name}'s is {format_seconds(abs(value))} {'ahead of' if value > 0 else 'behind'} this machine's"
        )
        yield CLOCK_CHECKS.warn(
            name, observation, "synchronise the clocks (chrony, ntpd): times of requests will look odd"
        )
