"""After the pairs: counts of pairs that retention dropped go where their pairs would have gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from abreast_sidecar.compare import Rule, RuleSet
from abreast_sidecar.rejudge.counters import COUNTERS, Counters
from abreast_sidecar.rejudge.places import Known, by_place
from abreast_sidecar.rejudge.write import known_findings, mark_due, rows_of, write_counters
from abreast_sidecar.store.database import Connection, Row, statement


async def settle(connection: Connection, rules: RuleSet, began: Mapping[int, int], listed: int) -> None:
    """`listed`: the version for which all pairs were judged again. Rules that began later are not looked at."""
    holding = [rule for rule in rules.rules if began[int(rule.name)] <= listed and not rule.status]
    findings = await known_findings(connection)
    concerned = [known.id for known in findings.values() if _first(holding, known)]
    rows = await rows_of(connection, "reapply_totals", {"findings": concerned, "version": listed})
    ids = sorted({row["finding_id"] for row in rows})
    if not ids:
        return
    await connection.execute(statement("findings_lock"), {"ids": ids})
    # Read again under the locks: workers may have counted since.
    rows = await rows_of(connection, "reapply_totals", {"findings": concerned, "version": listed})
    counters = Counters.of(rows)
    for row in rows:
        if row["finding_id"] in findings:
            _settle(row, findings[row["finding_id"]], holding, counters)
    await mark_due(connection, await write_counters(connection, counters, findings, {}))


def _settle(row: Row, known: Known, holding: Sequence[Rule], counters: Counters) -> None:
    target = _first([rule for rule in holding if rule.applies_to_release(row["new_label"])], known)
    if target == row["rule_id"]:
        return
    place = (known.id, row["old_release"], row["new_release"])
    counters.note(known.id, row["last_seen"])
    counters.shift((row["rule_id"], *place), (target, *place), {name: row[name] for name in COUNTERS})


def _first(rules: Iterable[Rule], known: Known) -> int:
    """NOBODY, or the rule that explains the finding in all answers of a release."""
    return by_place([rule for rule in rules if rule.applies_to(known.service, known.endpoint)], known)
