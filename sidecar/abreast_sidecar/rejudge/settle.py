"""After the pairs: counts of pairs that retention dropped go where their pairs would have gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from abreast_sidecar.compare import Rule, RuleSet
from abreast_sidecar.rejudge.counters import MOVED_COUNTERS, CounterMoves
from abreast_sidecar.rejudge.places import FindingRef, find_explaining_rule
from abreast_sidecar.rejudge.write import fetch_rows, load_findings, mark_endpoints_due, write_counters
from abreast_sidecar.store.database import Connection, Row, load_statement


async def redistribute_dropped(
    connection: Connection, rules: RuleSet, first_versions: Mapping[int, int], listed_version: int
) -> None:
    """`listed`: the version for which all pairs were judged again. Rules that began later are not looked at."""
    active_rules = [
        rule for rule in rules.rules if first_versions[int(rule.name)] <= listed_version and not rule.status
    ]
    findings = await load_findings(connection)
    finding_ids = [finding.id for finding in findings.values() if _find_rule(active_rules, finding)]
    rows = await fetch_rows(
        connection, "reapply_totals", {"findings": finding_ids, "version": listed_version}
    )
    ids = sorted({row["finding_id"] for row in rows})
    if not ids:
        return
    await connection.execute(load_statement("findings_lock"), {"ids": ids})
    # Read again under the locks: workers may have counted since.
    rows = await fetch_rows(
        connection, "reapply_totals", {"findings": finding_ids, "version": listed_version}
    )
    counters = CounterMoves.from_rows(rows)
    for row in rows:
        if row["finding_id"] in findings:
            _redistribute_row(row, findings[row["finding_id"]], active_rules, counters)
    await mark_endpoints_due(connection, await write_counters(connection, counters, findings, {}))


def _redistribute_row(
    row: Row, finding: FindingRef, active_rules: Sequence[Rule], counters: CounterMoves
) -> None:
    target = _find_rule([rule for rule in active_rules if rule.applies_to_release(row["new_label"])], finding)
    if target == row["rule_id"]:
        return
    key_suffix = (finding.id, row["old_release"], row["new_release"])
    counters.extend_span(finding.id, row["last_seen"])
    counters.move_counts(
        (row["rule_id"], *key_suffix), (target, *key_suffix), {name: row[name] for name in MOVED_COUNTERS}
    )


def _find_rule(rules: Iterable[Rule], finding: FindingRef) -> int:
    """NOBODY, or the rule that explains the finding in all answers of a release."""
    return find_explaining_rule(
        [rule for rule in rules if rule.applies_to(finding.service, finding.endpoint)], finding
    )
