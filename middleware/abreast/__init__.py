"""Abreast in a service: capture the responses to sampled requests, so that the sidecar can compare two versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from abreast.context import RequestContext, current, downstream_headers, extract, inject, is_shadow, span
from abreast.effects import Effect, effect, record
from abreast.errors import AbreastError, CaptureError, EffectError, SettingError, ShadowError

if TYPE_CHECKING:
    from abreast.middleware import ParallelRunMiddleware

__all__ = [
    "AbreastError",
    "CaptureError",
    "Effect",
    "EffectError",
    "ParallelRunMiddleware",
    "RequestContext",
    "SettingError",
    "ShadowError",
    "current",
    "downstream_headers",
    "effect",
    "extract",
    "inject",
    "is_shadow",
    "record",
    "span",
]


def __getattr__(name: str) -> Any:
    """Import the middleware on first use: the command line starts faster without redis-py."""
    if name != "ParallelRunMiddleware":
        raise AttributeError(f"module 'abreast' has no attribute {name!r}")
    from abreast.middleware import ParallelRunMiddleware

    return ParallelRunMiddleware
