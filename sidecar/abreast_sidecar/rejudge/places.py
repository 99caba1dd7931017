"""Where the findings of a stored pair belong under the rules that hold: to the finding, or to a rule. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from abreast_sidecar.compare import Difference, Rule, RuleSet, Subject
from abreast_sidecar.store.catalogue import OTHER
from abreast_sidecar.store.database import Row

ERROR = 500  # what a client was told where no answer began
NOBODY = 0  # in place of a rule: nothing explains it


@dataclass(frozen=True, slots=True)
class Known:
    """A finding, as far as rules ask for it."""

    id: int
    endpoint_id: int
    part: str
    path: str
    kind: str
    impact: str
    status: str
    service: str
    method: str
    route: str

    @property
    def endpoint(self) -> str:
        return f"{self.method} {self.route}"

    @property
    def difference(self) -> Difference:
        return Difference.told(self.part, self.path, "", self.kind, self.impact, None, None)  # type: ignore[arg-type]  # the ledger's words


@dataclass(frozen=True, slots=True)
class Places:
    """By finding the id of the rule that explains it, or NOBODY."""

    findings: Mapping[int, int]
    noise: Mapping[int, int]
    unknown: Mapping[int, int] = field(default_factory=dict)  # finding → rule that came too late to tell


def stored(row: Row) -> Places:
    return Places(
        _joined(row["findings"], row["explained"], row["explained_by"]),
        _joined(row["baseline_findings"], row["baseline_explained"], row["baseline_explained_by"]),
    )


def _joined(
    left: Iterable[int], explained: Sequence[int] | None, rules: Sequence[int] | None
) -> dict[int, int]:
    return dict.fromkeys(left, NOBODY) | dict(zip(explained or (), rules or (), strict=True))


def columns(places: Places) -> dict[str, list[int] | None]:
    hidden = {finding: rule for finding, rule in places.findings.items() if rule}
    noise = {finding: rule for finding, rule in places.noise.items() if rule}
    return {
        "findings": [finding for finding, rule in places.findings.items() if not rule],
        "explained": list(hidden) or None,
        "explained_by": list(hidden.values()) or None,
        "baseline_findings": [finding for finding, rule in places.noise.items() if not rule],
        "baseline_explained": list(noise) or None,
        "baseline_explained_by": list(noise.values()) or None,
    }


def subject(row: Row) -> Subject:
    statuses = tuple(0 if code is None else code or ERROR for code in (row["old_status"], row["new_status"]))
    return Subject(
        service=row["service"],
        endpoint=f"{row['method']} {row['route']}",
        old_release=row["old_release"],
        new_release=row["new_release"],
        statuses=(statuses[0], statuses[1]),
    )


def by_place(rules: Iterable[Rule], known: Known) -> int:
    """The first rule that explains the finding whatever its values are."""
    for rule in rules:
        if decides(rule, known) and rule.explains(known.difference):
            return int(rule.name)
    return NOBODY


def decides(rule: Rule, known: Known) -> bool:
    """Whether the row alone tells. Paths beyond an endpoint's limit are one finding, and not known any more."""
    return rule.by_place and not (known.path == OTHER and rule.path)


def told(row: Row, rules: RuleSet, began: Mapping[int, int], findings: Mapping[int, Known]) -> Places:
    """What the row alone tells. What a rule explained whose values are not kept stays so while the rule holds."""
    before = stored(row)
    applying = rules.of(subject(row)).rules
    judged_by = row["rules_version"] or 0
    unknown = {}
    made = []
    for places in (before.findings, before.noise):
        now = {}
        for finding, rule in places.items():
            if finding not in findings or (rule and any(one.name == str(rule) for one in applying)):
                now[finding] = rule
                continue
            now[finding] = by_place(applying, findings[finding])
            late = [
                int(one.name)
                for one in applying
                if began.get(int(one.name), 0) > judged_by and not decides(one, findings[finding])
                and one.touches(findings[finding].part, findings[finding].path, findings[finding].kind)
            ]  # fmt: skip
            if not now[finding] and late and places is before.findings:
                unknown[finding] = late[0]
        made.append(now)
    return Places(made[0], made[1], unknown)
