"""Judges what is stored again when the rules change."""

from abreast_sidecar.rejudge.evidence import Learning
from abreast_sidecar.rejudge.rejudge import rejudge

__all__ = ["Learning", "rejudge"]
