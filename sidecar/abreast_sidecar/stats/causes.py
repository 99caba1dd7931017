"""Groups findings into causes across endpoints, and ranks the causes by their harm to users. Pure.

Findings have one cause if they have the same part, the same name at the end of their path, the same kind and the same
transition, such as number → string. Three groups are wider, because one change of code makes many findings:

- A transition that keeps the value, such as 1.5 → "1.5" or one time zone → another, is one serializer, whatever the name.
- All `access-control-*` headers are one CORS layer.
- Findings that only error pages of one status show are one error page.

Causes with the same harm are merged if the same pairs show them: JSON members or headers that are all missing or all
new, and all parts of an HTML or XML document. They are one changed model, layer or template. One of the causes may show
at further endpoints.

Some findings explain others: a change of the status, an error, and a body or content type of another kind. A finding
whose examples all show such a finding is its consequence, and belongs to its cause.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, get_args

import orjson
from msgspec import Struct

from abreast_sidecar.compare.values import type_name

Harm = Literal["server_error", "status_change", "lost_content", "slower", "changed_value", "caching", "addition"]

HARMS: tuple[Harm, ...] = get_args(Harm)  # the worst first
STATES = ("real", "undecided", "noise")  # the strongest evidence first
CORS_PREFIX = "access-control-"
CORS_SHAPE = "access-control-*"
CACHING_HEADERS = frozenset({"cache-control", "etag", "expires", "last-modified", "pragma", "vary"})
ANY_NAME = "*"  # the shape of the path if the transition identifies the cause
ERROR_CLASS = "4"  # the class of the least status of an error
MIN_MERGED_PAIRS = 5  # of a cause that is merged into one with more endpoints: equal counts of few pairs are chance
_LAST_NAME = re.compile(r"""(?:\.|\[['"])([^.\[\]'"]+)(?:['"]\])?(?:\[\*\]|\.\*)*$""")
_TIMESTAMP_MASK = "9999-99-99"


class CauseMember(Struct, frozen=True):
    """A finding with what its examples show."""

    id: int
    service: str
    method: str
    route: str
    part: str
    path: str
    kind: str
    impact: str
    count: int
    state: str
    is_explained: bool = False  # noise, expected or fixed: it does not count against a verdict
    old: str | None = None  # JSON texts of the first pair
    new: str | None = None
    error_status: int = 0  # the status of both answers, if all examples have the same one, and it is an error
    companions: Sequence[int] = ()  # primary findings of the endpoint that all examples show too


@dataclass(frozen=True, slots=True)
class Cause:
    """Findings with one cause. `lead` represents them; `members` and `consequences` begin with the most frequent."""

    id: int  # the least id of its members
    harm: Harm
    shape: str  # of the path, such as `price`, `access-control-*` or `error page 404`
    transition: str  # such as `number → string`; may be empty
    state: str  # the strongest of its members
    is_explained: bool
    pairs: int  # the pairs of each endpoint's most frequent member
    lead: CauseMember
    members: tuple[CauseMember, ...]
    consequences: tuple[CauseMember, ...]

    @property
    def endpoints(self) -> list[CauseMember]:
        """Return the most frequent member of each endpoint, the most frequent first."""
        members: dict[tuple[str, str, str], CauseMember] = {}
        for member in self.members:
            members.setdefault((member.service, member.method, member.route), member)
        return list(members.values())

    def includes(self, finding_id: int) -> bool:
        return any(member.id == finding_id for member in (*self.members, *self.consequences))

    @property
    def sort_key(self) -> tuple[bool, int, bool, int, int, int]:
        before, _, after = self.lead.path.partition("->")
        is_no_failure = self.lead.part == "status" and not before < ERROR_CLASS <= after
        return self.is_explained, HARMS.index(self.harm), is_no_failure, STATES.index(self.state), -self.pairs, self.id


def group_causes(findings: Iterable[CauseMember]) -> list[Cause]:
    """Group findings into causes, the most harmful first, however rare it is."""
    findings_by_id = {finding.id: finding for finding in findings}
    members: dict[tuple[Any, ...], list[CauseMember]] = defaultdict(list)
    consequences: dict[tuple[Any, ...], list[CauseMember]] = defaultdict(list)
    keys = {finding.id: _make_key(finding) for finding in findings_by_id.values()}
    for finding in findings_by_id.values():
        primary = _find_primary(finding, findings_by_id)
        (members if primary is finding else consequences)[keys[primary.id]].append(finding)
    shapes = {key: key[3] for key in members}
    for key, first_key in _find_merges(members).items():
        members[first_key] += members.pop(key)
        consequences[first_key] += consequences.pop(key, [])
        shapes[first_key] = ANY_NAME
    causes = (_make_cause(group, consequences[key], shapes[key], key[5]) for key, group in members.items())
    return sorted(causes, key=lambda cause: cause.sort_key)


def _find_merges(members: Mapping[tuple[Any, ...], Sequence[CauseMember]]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Return the causes to merge into another one, by their keys. `members`: by the key of the cause."""
    counts_by_key = {key: _count_pairs(group) for key, group in members.items()}
    scopes = {key: _make_merge_scope(key, group) for key, group in members.items()}
    merges = {}
    keys_by_place: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)  # by scope, endpoint and count
    for key in sorted(members, key=lambda key: -len(counts_by_key[key])):
        counts, scope = counts_by_key[key], scopes[key]
        if scope is None:
            continue
        is_frequent = sum(counts.values()) >= MIN_MERGED_PAIRS
        for other in keys_by_place[scope, max(counts.items(), key=itemgetter(1))]:
            other_counts = counts_by_key[other]
            if counts.items() <= other_counts.items() and (is_frequent or len(counts) == len(other_counts)):
                merges[key] = other
                break
        else:
            for place in counts.items():
                keys_by_place[scope, place].append(key)
    return merges


def _make_merge_scope(key: tuple[Any, ...], group: Sequence[CauseMember]) -> tuple[Any, ...] | None:
    """Return what causes that can be merged have in common, or None for a cause that can't be merged."""
    service, is_explained, part, _shape, kind, _transition = key
    is_document = part == "body" and all(member.path and not member.path.startswith("$") for member in group)
    if not kind or part not in {"body", "header"} or not (is_document or kind in {"removed", "added"}):
        return None
    harm = min((rank_harm(member) for member in group), key=HARMS.index)
    return service, is_explained, part, is_document or kind, harm


def _count_pairs(group: Iterable[CauseMember]) -> dict[tuple[str, str, str], int]:
    """Return the pairs of each endpoint's most frequent member."""
    counts: dict[tuple[str, str, str], int] = {}
    for member in group:
        endpoint = member.service, member.method, member.route
        counts[endpoint] = max(counts.get(endpoint, 0), member.count)
    return counts


@lru_cache(maxsize=16_384)  # the values of a finding stay those of its first pair
def describe_transition(old: str | None, new: str | None) -> tuple[str, bool]:
    """Describe how values change, such as `number → string`. The flag is True if the value itself stays the same.

    `old` and `new` are JSON texts; an absent value is None.
    """
    before, after = (_parse(text) for text in (old, new))
    names = [_name_type(text, value) for text, value in ((old, before), (new, after))]
    if old is None or new is None:
        return " → ".join(names), (before, after) == (None, None) and "null" in names
    if names[0] != names[1]:
        number = _parse_number(before)
        is_same_number = number is not None and number == _parse_number(after)
        return " → ".join(names), str(before) == str(after) or (not before and not after) or is_same_number
    masks = [re.sub(r"\d", "9", value) if isinstance(value, str) else "" for value in (before, after)]
    if masks[0] != masks[1] and all(mask.startswith(_TIMESTAMP_MASK) for mask in masks):
        return " → ".join(masks), True
    return "", False


def rank_harm(finding: CauseMember) -> Harm:
    """Return the harm of a finding to the users of the service."""
    if finding.part == "status":
        before, _, after = finding.path.partition("->")
        if before[:1] == after[:1]:
            return "changed_value"
        return "server_error" if after.startswith("5") else "status_change"
    if finding.part == "error":
        return "server_error" if finding.impact == "breaking" else "changed_value"
    if finding.part in {"latency", "cache"}:
        return "slower"
    if finding.impact == "additive":
        return "addition"
    is_breaking = finding.impact == "breaking"
    if finding.part == "header" and finding.path in CACHING_HEADERS:
        # Without `no-store` and the like, a cache may give the response of one user to another one.
        return "lost_content" if is_breaking and finding.path == "cache-control" else "caching"
    if _is_cors(finding) and not is_breaking:
        return "caching"
    return "lost_content" if is_breaking else "changed_value"


def _find_primary(finding: CauseMember, findings_by_id: dict[int, CauseMember]) -> CauseMember:
    """Return the finding that this one is a consequence of, directly or over others, or the finding itself."""
    order = _primary_order(finding)
    companions = (findings_by_id[id_] for id_ in finding.companions if id_ in findings_by_id)
    candidates = [
        other
        for other in companions
        if _primary_order(other) < order and other.is_explained == finding.is_explained and finding.count <= other.count
    ]
    if not candidates:
        return finding
    return _find_primary(min(candidates, key=lambda other: (_primary_order(other), other.id)), findings_by_id)


def _primary_order(finding: CauseMember) -> int:
    if finding.part in {"status", "error"}:
        return 0
    if finding.part == "body" and finding.path in {"", "$"} and finding.kind == "type":
        return 1
    return 2 if (finding.part, finding.path) == ("header", "content-type") else 3


def _make_key(finding: CauseMember) -> tuple[Any, ...]:
    """Return the service, the flag for explained findings, and what findings with one cause have in common."""
    scope = (finding.service, finding.is_explained)
    if finding.error_status and finding.part in {"header", "body"}:
        return (*scope, "body", f"error page {finding.error_status}", "", "")
    if _is_cors(finding):
        return (*scope, "header", CORS_SHAPE, "", "")
    transition, is_kept = describe_transition(finding.old, finding.new) if finding.part == "body" else ("", False)
    if finding.part == "body" and finding.kind in {"removed", "added"} and not is_kept:
        transition = ""  # the type of the other versions' values does not matter
    shape = ANY_NAME if is_kept else _name_shape(finding)
    return (*scope, finding.part, shape, finding.kind, transition)


def _name_shape(finding: CauseMember) -> str:
    match = _LAST_NAME.search(finding.path) if finding.part == "body" else None
    return match[1] if match else finding.path


def _is_cors(finding: CauseMember) -> bool:
    return finding.part == "header" and finding.path.startswith(CORS_PREFIX)


def _make_cause(group: list[CauseMember], consequences: Sequence[CauseMember], shape: str, transition: str) -> Cause:
    members = sorted(group, key=lambda member: (-member.count, member.id))
    lead = min(members, key=lambda member: (HARMS.index(rank_harm(member)), -member.count, member.id))
    return Cause(
        id=min(member.id for member in members),
        harm=rank_harm(lead),
        shape=shape,
        transition=transition,
        state=min((member.state for member in members), key=STATES.index),
        is_explained=lead.is_explained,
        pairs=sum(_count_pairs(members).values()),
        lead=lead,
        members=tuple(members),
        consequences=tuple(sorted(consequences, key=lambda member: (-member.count, member.id))),
    )


def _name_type(text: str | None, value: Any) -> str:
    """Return the type of a value; the text of a long array or object is cut, and can't be parsed."""
    if text is None:
        return "absent"
    return {"[": "array", "{": "object"}.get(text[:1], type_name(value))


def _parse(text: str | None) -> Any:
    try:
        return text if text is None else orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _parse_number(value: Any) -> float | None:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return None
