"""Comparing what two versions did with one request. Pure: no network, no database, no clock."""

from abreast_sidecar.compare.body import compare_bodies, diff_bodies
from abreast_sidecar.compare.difference import VOLATILE_HEADERS, CompareOptions, ComparisonResult, Difference
from abreast_sidecar.compare.document import JsonDiff
from abreast_sidecar.compare.headers import diff_headers
from abreast_sidecar.compare.judge import compare_pair
from abreast_sidecar.compare.rules import Rule, RuleScope, RuleSet

__all__ = [
    "VOLATILE_HEADERS",
    "CompareOptions",
    "ComparisonResult",
    "Difference",
    "JsonDiff",
    "Rule",
    "RuleScope",
    "RuleSet",
    "compare_bodies",
    "compare_pair",
    "diff_bodies",
    "diff_headers",
]
