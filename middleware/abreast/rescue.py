"""Faults of ours: counted by the place where they happened, logged once each, never passed on."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger("abreast")

MOST_NAMES = 100


class Rescue:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._known: set[tuple[str, type[BaseException]]] = set()

    def __call__(self, name: str, error: BaseException) -> None:
        self.counts[name] += 1
        known = (name, type(error))
        if known not in self._known and len(self._known) < MOST_NAMES:
            self._known.add(known)
            logger.warning("recording failed in %s; requests go on (logged once)", name, exc_info=error)
