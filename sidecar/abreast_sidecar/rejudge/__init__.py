"""Judges what is stored again when the rules change."""

from abreast_sidecar.rejudge.evidence import FindingIds
from abreast_sidecar.rejudge.rejudge import reapply_rules

__all__ = ["FindingIds", "reapply_rules"]
