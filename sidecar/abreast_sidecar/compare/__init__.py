"""Comparing what two versions did with one request. Pure: no network, no database, no clock."""

from abreast_sidecar.compare.body import body_differences, compare_bodies
from abreast_sidecar.compare.difference import VOLATILE_HEADERS, Difference, Judgement, Rules
from abreast_sidecar.compare.document import DocumentDiff
from abreast_sidecar.compare.headers import header_differences
from abreast_sidecar.compare.judge import judge
from abreast_sidecar.compare.rules import Rule, RuleSet, Subject

__all__ = [
    "VOLATILE_HEADERS",
    "Difference",
    "DocumentDiff",
    "Judgement",
    "Rule",
    "RuleSet",
    "Rules",
    "Subject",
    "body_differences",
    "compare_bodies",
    "header_differences",
    "judge",
]
