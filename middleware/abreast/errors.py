"""Faults of ours: counted by the place where they happened, logged once each, never passed on."""

from __future__ import annotations

import logging
from collections import Counter


class AbreastError(Exception):
    pass


class SettingError(AbreastError):
    pass


class CaptureError(AbreastError):
    pass


class EffectError(AbreastError):
    pass


class ShadowError(AbreastError):
    pass


logger = logging.getLogger("abreast")

MAX_LOGGED_ERRORS = 100


class ErrorReporter:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[tuple[str, type[BaseException]]] = set()

    def __call__(self, operation: str, error: BaseException) -> None:
        self.counts[operation] += 1
        error_key = (operation, type(error))
        if error_key not in self._logged and len(self._logged) < MAX_LOGGED_ERRORS:
            self._logged.add(error_key)
            logger.warning("recording failed in %s; requests go on (logged once)", operation, exc_info=error)
