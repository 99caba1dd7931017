"""What explains findings, on the command line: listed apart, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import format_count, to_printable
from abreast_sidecar.cli.tables import endpoint_name, format_location, make_table, style_text

CAUSES_OUTSIDE_COUNT = {
    api.EXPLANATION_CAUSE_RULE,
    api.EXPLANATION_CAUSE_DRIFT,
}  # of pairs that the finding does not count


def format_cause(explanation: api.FindingExplanation) -> str:
    return api.ExplanationCause.Name(explanation.cause).removeprefix("EXPLANATION_CAUSE_").lower()


def format_explanation(explanation: api.FindingExplanation) -> str:
    """`rule 7 (cents), shop: rounding`."""
    if explanation.cause == api.EXPLANATION_CAUSE_RULE:
        return to_printable(
            f"rule {explanation.rule_id} ({explanation.rule_name}), {explanation.owner}: {explanation.reason}"
        )
    return to_printable(explanation.reason)


def count_pairs_outside(finding: api.Finding) -> int:
    """Pairs that show it and are not among its count."""
    return sum(
        explanation.pairs for explanation in finding.explanations if explanation.cause in CAUSES_OUTSIDE_COUNT
    )


def build_explanations_table(findings: Iterable[api.Finding]) -> Table:
    """One row for each that explains."""
    table = make_table(
        "id", "as", "requests", "endpoint", "where", "why", numeric_columns=frozenset({"id", "requests"})
    )
    for finding in findings:
        for explanation in finding.explanations:
            table.add_row(
                str(finding.id),
                style_text(format_cause(explanation), "dim"),
                format_count(explanation.pairs),
                endpoint_name(finding.endpoint),
                format_location(finding.part, finding.path),
                format_explanation(explanation),
            )
    return table
