"""Asks both versions again, to tell drift of state from a difference."""

from abreast_sidecar.again.again import Rechecker, RecheckSettings

__all__ = ["RecheckSettings", "Rechecker"]
