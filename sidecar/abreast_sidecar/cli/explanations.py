"""What explains findings, on the command line: listed apart, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import count, printable
from abreast_sidecar.cli.tables import endpoint_name, styled, table, where

BESIDE = {api.EXPLANATION_CAUSE_RULE, api.EXPLANATION_CAUSE_DRIFT}  # of pairs that the finding does not count


def cause(one: api.FindingExplanation) -> str:
    return api.ExplanationCause.Name(one.cause).removeprefix("EXPLANATION_CAUSE_").lower()


def why(one: api.FindingExplanation) -> str:
    """`rule 7 (cents), shop: rounding`."""
    if one.cause == api.EXPLANATION_CAUSE_RULE:
        return printable(f"rule {one.rule_id} ({one.rule_name}), {one.owner}: {one.reason}")
    return printable(one.reason)


def beside(finding: api.Finding) -> int:
    """Pairs that show it and are not among its count."""
    return sum(one.pairs for one in finding.explanations if one.cause in BESIDE)


def listing(findings: Iterable[api.Finding]) -> Table:
    """One row for each that explains."""
    made = table("id", "as", "requests", "endpoint", "where", "why", right=frozenset({"id", "requests"}))
    for finding in findings:
        for one in finding.explanations:
            made.add_row(
                str(finding.id),
                styled(cause(one), "dim"),
                count(one.pairs),
                endpoint_name(finding.endpoint),
                where(finding.part, finding.path),
                why(one),
            )
    return made
