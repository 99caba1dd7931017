"""The traffic settings of each service that this sidecar sends to Envoys, in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from abreast_sidecar.aio import Notifier
from abreast_sidecar.traffic.model import Traffic

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CurrentTraffic:
    traffic: Traffic
    changed_monotonic: float

    @property
    def drill_ends_monotonic(self) -> float | None:
        """Return the end of the drill, None without a drill."""
        shares = self.traffic.shares
        return self.changed_monotonic + shares.drill_s if shares.drill_share else None

    def end_drill(self) -> CurrentTraffic:
        """Return the settings without a drill whose time is over."""
        end = self.drill_ends_monotonic
        if end is None or time.monotonic() < end:
            return self
        return CurrentTraffic(self.traffic.end_drill(), end)


class TrafficState:
    """Settings stay in force while Postgres is away. `notifier` wakes those who send them to Envoys."""

    def __init__(self) -> None:
        self.notifier = Notifier()
        self._current: dict[str, CurrentTraffic] = {}

    def get(self, service: str) -> CurrentTraffic | None:
        return self._current.get(service)

    def list_services(self) -> set[str]:
        return set(self._current)

    @property
    def revisions(self) -> dict[str, str]:
        """Return the revision of each service's settings."""
        return {service: current.traffic.revision for service, current in self._current.items()}

    def set(self, traffic: Traffic, age_s: float) -> None:
        current = self.get(traffic.service)
        if current is not None and current.traffic == traffic:
            return
        self._current[traffic.service] = CurrentTraffic(traffic, time.monotonic() - age_s)
        log.info("traffic settings changed", service=traffic.service, version=traffic.version, shares=traffic.shares)
        self.notifier.notify_all()
