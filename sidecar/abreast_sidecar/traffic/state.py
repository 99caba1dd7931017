"""The newest known traffic settings of each service, in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from abreast_sidecar.aio import Notifier
from abreast_sidecar.traffic.model import Traffic
from abreast_sidecar.traffic.repository import VersionedTraffic

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CurrentTraffic:
    traffic: Traffic
    changed_monotonic: float


class TrafficState:
    """Settings stay in force while Postgres is away. `notifier` wakes those who send them to Envoys."""

    def __init__(self) -> None:
        self.notifier = Notifier()
        self._current: dict[str, CurrentTraffic] = {}

    def get(self, service: str) -> CurrentTraffic | None:
        return self._current.get(service)

    def list_services(self) -> set[str]:
        return set(self._current)

    def observe(self, snapshot: VersionedTraffic) -> None:
        """Take over settings from Postgres, unless newer ones are known."""
        traffic = snapshot.traffic
        current = self.get(traffic.service)
        if not traffic.is_newer_than(current.traffic if current else None):
            return
        self._current[traffic.service] = CurrentTraffic(traffic, time.monotonic() - snapshot.age_s)
        log.info("traffic settings changed", service=traffic.service, version=traffic.version, shares=traffic.shares)
        self.notifier.notify_all()
