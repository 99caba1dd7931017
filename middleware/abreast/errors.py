"""Errors of the middleware, and the reporter that keeps internal errors away from the service."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger("abreast")

MAX_LOGGED_ERRORS = 100


class AbreastError(Exception):
    """Base class of the errors that Abreast raises in a service."""


class SettingError(AbreastError):
    """A setting has an invalid value."""


class CaptureError(AbreastError):
    """A capture can't be decoded."""


class EffectError(AbreastError):
    """An effect is declared or used incorrectly."""


class ShadowError(AbreastError):
    """A shadow request tries an operation that it must not do."""


class UnprovenCopyError(AbreastError):
    """A copy has no proof that it comes from Envoy. The middleware refuses it."""


class ErrorReporter:
    """Count internal errors by operation, and log each kind once. It never raises them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[tuple[str, type[BaseException]]] = set()

    def __call__(self, operation: str, error: BaseException) -> None:
        self.counts[operation] += 1
        error_key = (operation, type(error))
        if error_key not in self._logged and len(self._logged) < MAX_LOGGED_ERRORS:
            self._logged.add(error_key)
            logger.warning("recording failed in %s; requests are not affected (logged once)", operation, exc_info=error)
