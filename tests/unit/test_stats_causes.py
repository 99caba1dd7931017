"""Findings grouped into causes, and their order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.causes import HARMS, CauseMember, describe_transition, group_causes, rank_harm


def member(number: int, path: str, route: str = "/a", **fields: Any) -> CauseMember:
    defaults: dict[str, Any] = {"part": "body", "kind": "changed", "impact": "value", "count": 10, "state": "real"}
    return CauseMember(number, "shop", "GET", route, path=path, **defaults | fields)


def status(number: int, path: str, route: str = "/a", **fields: Any) -> CauseMember:
    return member(number, path, route, part="status", impact="breaking", **fields)


def header(number: int, name: str, route: str = "/a", **fields: Any) -> CauseMember:
    return member(number, name, route, part="header", **fields)


def retyped(number: int, path: str, route: str = "/a") -> CauseMember:
    return member(number, path, route, kind="type", impact="breaking", old="1.5", new='"1.5"')


def test_causes_span_endpoints_and_depths_of_a_path() -> None:
    findings = [
        member(1, "$.items[*].colour", "/a", kind="removed", impact="breaking", count=3, old='"red"'),
        member(2, "$.colour", "/b", kind="removed", impact="breaking", count=7, old='"blue"'),
        member(3, "$.colour", "/c"),
    ]

    removed, changed = group_causes(findings)

    assert [(item.id, item.route) for item in removed.endpoints] == [(2, "/b"), (1, "/a")]
    assert (removed.id, removed.shape, removed.harm, removed.pairs) == (1, "colour", "lost_content", 10)
    assert changed.id == 3


def test_serializer_that_keeps_values_is_one_cause() -> None:
    findings = [retyped(1, "$.price"), retyped(2, "$.total", "/b"), retyped(3, "$.tax", "/c")]
    other = member(4, "$.name", kind="type", impact="breaking", old="1", new='"x"')

    causes = group_causes([*findings, other])

    assert [[item.id for item in cause.members] for cause in causes] == [[1, 2, 3], [4]]
    assert (causes[0].shape, causes[0].transition) == ("*", "number → string")


def test_cors_layer_is_one_cause() -> None:
    names = ("access-control-allow-origin", "access-control-expose-headers", "access-control-allow-credentials")
    findings = [header(10 * n + m, name, f"/{m}", kind="removed") for n, name in enumerate(names) for m in range(1, 8)]

    (cause,) = group_causes(findings)

    assert (cause.shape, cause.harm, len(cause.members), len(cause.endpoints)) == ("access-control-*", "caching", 21, 7)


def test_error_page_is_one_cause() -> None:
    fields: dict[str, Any] = {"impact": "breaking", "error_status": 404}
    findings = [
        member(1, "$.detail", kind="removed", **fields),
        member(2, "$.error", kind="added", error_status=404, impact="additive"),
        header(3, "x-error", "/b", kind="added", error_status=404),
        member(4, "$.detail", "/b", kind="removed", **fields),
        member(5, "$.detail", "/b", kind="removed", impact="breaking", error_status=422),
    ]

    causes = group_causes(findings)

    assert [(cause.shape, len(cause.members)) for cause in causes] == [("error page 404", 4), ("error page 422", 1)]


def test_consequences_belong_to_the_cause_of_the_status() -> None:
    findings = [
        status(1, "404->405", count=10),
        header(2, "allow", kind="added", count=10, companions=(1,)),
        member(3, "$.detail", count=12, companions=(1,)),  # other pairs show it too
        header(4, "x-other", count=2, companions=(9,)),
    ]

    causes = {cause.id: cause for cause in group_causes(findings)}

    assert sorted(causes) == [1, 3, 4]
    assert [item.id for item in causes[1].consequences] == [2]


def test_consequence_of_a_consequence_belongs_to_the_first_cause() -> None:
    findings = [
        status(1, "404->405"),
        header(2, "content-type", kind="changed", companions=(1,)),
        member(3, "$.detail", companions=(2,)),
    ]

    (cause,) = group_causes(findings)

    assert [item.id for item in cause.consequences] == [2, 3]


def test_rare_server_error_is_first() -> None:
    findings = [
        *(retyped(number, f"$.member_{number}", f"/{number}") for number in range(10, 110)),
        header(1, "cache-control", count=5000, kind="removed"),
        member(2, "$.added", kind="added", impact="additive", count=9000),
        member(3, "$.changed", count=8000),
        status(4, "200->404", count=1, state="undecided"),
        status(5, "200->500", count=1, state="undecided"),
        status(8, "200->302", count=9000),  # clients follow it
        status(9, "500->400", "/b", count=2, state="undecided"),
        member(6, "p50", part="latency", kind="slower", impact="value"),
        member(7, "$.gone", kind="removed", impact="breaking", state="noise", is_explained=True, count=99_999),
    ]

    causes = group_causes(findings)

    assert [cause.id for cause in causes] == [5, 4, 8, 9, 10, 6, 3, 1, 2, 7]
    assert list(dict.fromkeys(cause.harm for cause in causes[:-1])) == list(HARMS)


def test_noise_is_not_part_of_a_real_cause() -> None:
    causes = group_causes([member(1, "$.at"), member(2, "$.at", "/b", state="noise", is_explained=True)])

    assert [(cause.id, cause.is_explained, len(cause.members)) for cause in causes] == [(1, False, 1), (2, True, 1)]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("1.5", '"1.5"', ("number → string", True)),
        ("1.5", '"1.50"', ("number → string", True)),
        ("1.5", '"x"', ("number → string", False)),
        ("null", None, ("null → absent", True)),
        (None, "null", ("absent → null", True)),
        ("[]", "null", ("array → null", True)),
        ("1", None, ("number → absent", False)),
        ('"2026-01-01T00:00:00Z"', '"2026-01-01T00:00:00+00:00"', ("9999-99-99T99:99:99Z → 9999-99-99T99:99:99+99:99", True)),
        ('"a"', '"b"', ("", False)),
        ("{bro", "{ken", ("", False)),
        ('[{"id":1},{"i…', '{"items":[{"i…', ("array → object", False)),
        ("null", "true", ("null → boolean", False)),
    ],
)  # fmt: skip
def test_transition_names_types_and_kept_values(old: str | None, new: str | None, expected: tuple[str, bool]) -> None:
    assert describe_transition(old, new) == expected


@pytest.mark.parametrize(
    ("finding", "harm"),
    [
        (status(1, "500->503"), "changed_value"),
        (status(1, "500->200"), "status_change"),
        (member(1, "no answer", part="error", impact="breaking"), "server_error"),
        (member(1, "raised", part="error"), "changed_value"),
        (header(1, "access-control-allow-origin", kind="removed", impact="breaking"), "lost_content"),
        (header(1, "access-control-allow-origin", kind="removed"), "caching"),
        (header(1, "cache-control", kind="removed", impact="breaking"), "lost_content"),
        (header(1, "cache-control", kind="removed"), "caching"),
        (header(1, "etag", kind="removed", impact="breaking"), "caching"),
        (header(1, "content-type", impact="breaking"), "lost_content"),
    ],
)
def test_harm_of_a_finding(finding: CauseMember, harm: str) -> None:
    assert rank_harm(finding) == harm


members = st.builds(
    member,
    st.integers(1, 10**6),
    st.sampled_from(["$.a", "$.b[*].a", "", "content-type", "access-control-allow-origin", "200->500", "200->201"]),
    st.sampled_from(["/a", "/b", "/c"]),
    part=st.sampled_from(["body", "header", "status", "error"]),
    kind=st.sampled_from(["changed", "removed", "type"]),
    impact=st.sampled_from(["breaking", "value", "additive"]),
    count=st.integers(1, 50),
    state=st.sampled_from(["real", "undecided"]),
    error_status=st.sampled_from([0, 404]),
    companions=st.lists(st.integers(1, 40), max_size=3).map(tuple),
)


@given(st.lists(members, unique_by=lambda item: item.id, max_size=30))
def test_each_finding_has_exactly_one_cause(findings: list[CauseMember]) -> None:
    causes = group_causes(findings)

    grouped = [item.id for cause in causes for item in (*cause.members, *cause.consequences)]
    assert sorted(grouped) == sorted(item.id for item in findings)
    assert [cause.sort_key for cause in causes] == sorted(cause.sort_key for cause in causes)
    assert len({cause.id for cause in causes}) == len(causes)


def test_members_that_vanish_together_are_one_cause() -> None:
    lost = [
        member(number, f"$.{name}", kind="removed", impact="breaking", old="1", count=count)
        for number, (name, count) in enumerate([("columns", 33), ("units", 33), ("query", 33), ("rare", 4)], 1)
    ]

    together, rare = group_causes(lost)

    assert (together.shape, [item.id for item in together.members]) == ("*", [1, 2, 3])
    assert (rare.shape, [item.id for item in rare.members]) == ("rare", [4])


def test_parts_of_a_page_that_change_together_are_one_cause() -> None:
    findings = [
        member(1, "html.body.footer.a.@title"),
        member(2, "html.head.link[*].@href"),
        member(3, "html.body.nav.a[*]", kind="added"),
        member(4, "html.body.form", kind="removed", impact="breaking"),
        member(5, "$.amount"),
        member(6, "$.total"),
    ]

    assert [[item.id for item in cause.members] for cause in group_causes(findings)] == [[4], [1, 2, 3], [5], [6]]


def vanished(number: int, path: str, route: str, count: int, part: str = "body") -> CauseMember:
    return member(number, path, route, part=part, kind="removed", impact="breaking", old="1", count=count)


def test_cause_joins_one_that_the_same_pairs_show_at_further_endpoints() -> None:
    findings = [
        *(
            vanished(10 + n, "$.query_ms", route, count)
            for n, (route, count) in enumerate([("/a", 90), ("/b", 7), ("/c", 3)])
        ),
        *(vanished(20 + n, "$.columns", route, count) for n, (route, count) in enumerate([("/a", 90), ("/b", 7)])),
        vanished(30, "$.fewer", "/a", 89),
        vanished(40, "$.chance", "/c", 3),
    ]

    causes = group_causes(findings)

    assert [(cause.shape, cause.pairs) for cause in causes] == [("*", 100), ("fewer", 89), ("chance", 3)]
    assert {item.path for item in causes[0].members} == {"$.query_ms", "$.columns"}


def test_headers_that_vanish_together_are_one_cause() -> None:
    findings = [
        *(
            vanished(1 + n, "vary", route, count, part="header")
            for n, (route, count) in enumerate([("/a", 90), ("/b", 7)])
        ),
        vanished(3, "pragma", "/a", 90, part="header"),
        vanished(4, "x-content-type-options", "/a", 90, part="header"),  # another harm
        vanished(5, "$.pragma", "/a", 90),
    ]

    causes = {cause.id: sorted(item.id for item in cause.members) for cause in group_causes(findings)}

    assert causes == {1: [1, 2, 3], 4: [4], 5: [5]}
