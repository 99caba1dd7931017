"""Asks both versions again, to tell drift of state from a difference."""

from abreast_sidecar.again.again import Again, AgainSettings

__all__ = ["Again", "AgainSettings"]
