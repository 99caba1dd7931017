"""Text output of the commands, made from messages of the API, in narrow and wide terminals."""

from __future__ import annotations

import datetime as dt
import io
from typing import Any

import pytest

import support_sidecar as messages
from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, traffic_pb2
from abreast_sidecar.cli import findings, pairs, rules, status, traffic, verdict
from abreast_sidecar.client.output import Console
from support_sidecar import NOW


def print_to_text(show: Any, *arguments: Any, width: int = 80, **options: Any) -> str:
    """Print to a console of this width, and return the text without trailing blanks."""
    out = Console(file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False)
    show(out, *arguments, **options)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def render(renderable: Any, width: int = 80) -> str:
    return print_to_text(lambda out: out.print(renderable), width=width)


def test_status_prints_requests_that_nobody_counted() -> None:
    summary = messages.summary()
    summary.uncertain = 7
    text = print_to_text(status.print_status, summary, None, NOW, width=120)

    line = next(line for line in text.splitlines() if line.startswith("uncertain"))
    assert "≤ 7" in line
    assert "more may have been sampled, by the rate before" in line


def test_status_prints_outcomes_and_missing_requests() -> None:
    text = print_to_text(
        status.print_status, messages.summary(), traffic_pb2.GetTrafficResponse(traffic=messages.traffic()), NOW
    )

    assert text == (
        "shop\n"
        "users: 75% old, 25% new · mirrored: 10% of safe requests, 0% of others\n"
        "\n"
        "outcome   requests  share\n"
        "match        1,204  93.1%\n"
        "mismatch        83   6.4%  12 of them explained or only additive\n"
        "only old         6   0.5%\n"
        "\n"
        "1,293 requests in 11 min 58 s, the last 2 s ago\n"
        "\n"
        "sampled by Envoy  1,295  2 in flight\n"
        "pending           2      wait for a copy or a worker\n"
        "dropped           3      service queue_bytes 3\n"
        "late              3      captures that arrived after the comparison\n"
        "dead letters      4      a capture of format 2 can't be read\n"
        "findings          7      see: abreast findings"
    )


@pytest.mark.parametrize(
    ("sampled", "unaccounted", "expected"),
    [
        (1_000, 0, "all of them are in the ledger"),
        (1_000, 20, "20 in flight"),
        (1_000, 21, "21 of them are in flight or lost"),
        (9_000, 90, "90 in flight"),
        (1_000, -3, "3 more in the ledger than counted so far"),
        (1_000, -300, "300 fewer than in the ledger: the count of an Envoy is missing or late"),
    ],
)
def test_status_tolerates_requests_in_flight(sampled: int, unaccounted: int, expected: str) -> None:
    summary = messages.summary()
    summary.envoy_sampled, summary.unaccounted = sampled, unaccounted
    text = print_to_text(status.print_status, summary, None, NOW, width=120)

    assert f"sampled by Envoy  {sampled:,}  {expected}\n" in text


@pytest.mark.parametrize(
    ("pending", "age", "expected"),
    [(0, 31, "2 of them are missing, and none is in flight"), (1, 31, "2 in flight"), (0, 29, "2 in flight")],
)
def test_status_reports_missing_requests_once_traffic_is_settled(pending: int, age: int, expected: str) -> None:
    summary = messages.summary()
    summary.envoy_sampled, summary.unaccounted, summary.pending = 1_000, 2, pending
    summary.last_pair_time.FromDatetime(NOW - dt.timedelta(seconds=age))
    text = print_to_text(status.print_status, summary, None, NOW, width=120)

    assert f"sampled by Envoy  1,000  {expected}\n" in text


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (34_560_000, "Postgres is 400 d ahead of the sidecar: synchronize the clocks"),
        (-3600, "Postgres is 1 h behind the sidecar: synchronize the clocks"),
        (299, ""),
    ],
)
def test_status_warns_about_clock_offset(ahead: int, expected: str) -> None:
    summary = messages.summary()
    summary.ledger_clock_ahead.FromSeconds(ahead)
    text = print_to_text(status.print_status, summary, None, NOW, width=120)

    assert (f"clocks            !      {expected}\n" in text) if expected else ("clocks" not in text)


def test_status_of_empty_ledger_recommends_doctor() -> None:
    text = print_to_text(status.print_status, api.GetSummaryResponse(service="shop"), None, NOW)

    assert "no request has been compared yet" in text
    assert "abreast doctor" in text
    assert "no admin address of an Envoy is set" in " ".join(text.split())


def test_status_marks_unknown_counts() -> None:
    summary = messages.summary()
    for name in ("pending", "envoy_sampled", "unaccounted"):
        summary.ClearField(name)
    text = print_to_text(status.print_status, summary, None, NOW)

    assert "pending           ?" in text
    assert "sampled by Envoy  ?" in text


def test_endpoints_fit_narrow_terminal() -> None:
    text = render(status.build_endpoints_table(messages.answers()["ListEndpoints"]))  # type: ignore[arg-type]

    assert "GET /products/{id}  learned     1,204   100%         2  3.1 ms    -  12 ms    -" in text


def test_findings_stack_endpoint_and_location_in_narrow_terminal() -> None:
    text = print_to_text(findings.print_findings, api.ListFindingsResponse(findings=[messages.finding()]))

    assert text.splitlines() == [
        "id  impact             requests  location            difference",
        '12  breaks clients  83   (6.9%)  GET /products/{id}  19.99 became "19.99"',
        "                                   $.items[*].price",
    ]


def test_findings_print_one_line_each_when_piped() -> None:
    text = print_to_text(findings.print_findings, api.ListFindingsResponse(findings=[messages.finding()]), width=400)

    assert text.splitlines()[1:] == [
        '12  breaks clients  83   (6.9%)  GET /products/{id}  $.items[*].price  19.99 became "19.99"'
    ]


def test_findings_mark_noise_and_name_services_if_several() -> None:
    noise = api.FindingExplanation(cause=api.EXPLANATION_CAUSE_NOISE, pairs=83)
    other = messages.finding(13, noise=True, explanations=[noise])
    other.endpoint.service = "cart"
    text = print_to_text(
        findings.print_findings, api.ListFindingsResponse(findings=[messages.finding(), other]), width=400
    )

    assert "noise" in text.splitlines()[2]
    assert "cart: GET /products/{id}" in text


def test_finding_prints_feature_of_its_requests() -> None:
    feature = api.RequestFeature(text="query.currency=JPY", coverage=1.0, precision=0.5)
    text = print_to_text(
        findings.print_finding, api.GetFindingResponse(finding=messages.finding(), feature=feature), NOW, width=160
    )

    affected = (
        "All affected requests have query.currency=JPY; 50.0% of the requests with query.currency=JPY are affected"
    )
    assert f"who            {affected}" in text


def test_undecided_finding_is_marked_as_possible_noise() -> None:
    undecided = messages.finding(state=api.FINDING_STATE_UNDECIDED)
    text = print_to_text(findings.print_findings, api.ListFindingsResponse(findings=[undecided]), width=400)

    assert '19.99 became "19.99" (may be noise)' in text
    assert findings.format_noise_state(undecided).startswith("not sure yet: new differs in 83")


def test_verdict_prints_reasons_and_pairs_to_pass() -> None:
    assert print_to_text(verdict.print_verdict, messages.verdict(), width=160).splitlines() == [
        "INCONCLUSIVE  shop  about 2,500 more pairs to pass, at these rates",
        "INCONCLUSIVE  coverage    GET /products/{id}: old answered 7 requests, new none",
        "INCONCLUSIVE  mismatches  0 of 1,000 pairs have unexplained mismatches: 0% (0% to 0.4%; limit 0.1%)",
        "",
        "endpoints that pass on their own: 1 of 2",
        "endpoint            verdict       reason",
        "GET /products/{id}  INCONCLUSIVE  old answered 7 requests, new none",
    ]


@pytest.mark.parametrize(
    ("state", "pairs_needed", "expected"),
    [
        (api.VERDICT_STATE_PASS, 0, ""),
        (api.VERDICT_STATE_FAIL, None, ""),
        (api.VERDICT_STATE_INCONCLUSIVE, 0, ""),
        (api.VERDICT_STATE_INCONCLUSIVE, None, "more traffic alone can't make it pass"),
    ],
)
def test_verdict_omits_pairs_to_pass_unless_inconclusive(
    state: api.VerdictState.ValueType, pairs_needed: int | None, expected: str
) -> None:
    assert verdict.format_pairs_to_pass(api.GetVerdictResponse(state=state, pairs_needed=pairs_needed)) == expected


def test_long_paths_are_folded_not_cut() -> None:
    long = messages.finding()
    long.path = "$." + ".".join(f"part{n}" for n in range(20))
    text = print_to_text(findings.print_findings, api.ListFindingsResponse(findings=[long]))

    assert max(map(len, text.splitlines())) <= 80
    assert "part19" in "".join(text.split())


def test_finding_prints_example_with_curl_line() -> None:
    response = api.GetFindingResponse(finding=messages.finding(), examples=[messages.pair_detail()])
    text = print_to_text(findings.print_finding, response, NOW, url="http://127.0.0.1:8002", width=120)

    assert text.splitlines()[:6] == [
        "#12  breaks clients  GET /products/{id}  $.items[*].price",
        "service        shop",
        'difference     type changed: 19.99 became "19.99"',
        "requests       83 of 1,204 compared (6.9%)",
        "seen           first 5 min ago, last 2 s ago",
        "real or noise  real: new differs in 83 of 1204, old from itself in 0 of 120: more than chance",
    ]
    assert "without its authorization (a secret; only its hash is stored)" in text
    assert "old 200 in 3.1 ms, new 200 in 41 ms; the user got old's" in text
    assert '$.items[0].price  type  breaks clients  19.99  "19.99"' in text


def test_slower_finding_says_that_no_request_shows_it() -> None:
    finding = messages.finding()
    finding.part, finding.path, finding.kind = common.PART_LATENCY, "", common.KIND_SLOWER
    text = print_to_text(findings.print_finding, api.GetFindingResponse(finding=finding), NOW, width=120)

    assert (
        "no single request shows this finding; all times of the endpoint: abreast endpoint GET '/products/{id}'" in text
    )
    assert "any more" not in text


def detail_of_failed_new() -> api.PairDetail:
    """Return a pair in which new raised before its response started."""
    detail = messages.pair_detail()
    detail.pair.new_status = 0
    new = detail.captures[1]
    new.status, new.exception, new.body, new.body_length = 0, "RuntimeError", b"", 0
    new.ClearField("headers")
    new.ClearField("first_byte")
    return detail


def test_exception_is_printed_by_name() -> None:
    response = api.GetFindingResponse(finding=messages.finding(), examples=[detail_of_failed_new()])

    assert "new       raised RuntimeError in 41 ms, release 2.0.0\n" in print_to_text(
        pairs.print_pair, detail_of_failed_new(), width=120
    )
    assert "new raised RuntimeError in 41 ms; the user" in print_to_text(
        findings.print_finding, response, NOW, width=120
    )


def test_summarise_response_covers_partial_captures() -> None:
    detail = detail_of_failed_new()
    late = detail_of_failed_new()
    late.pair.new_status = 200
    bare = api.PairDetail(pair=detail.pair)

    assert pairs.summarise_response(late, common.VERSION_NEW) == "200 in 41 ms, then raised RuntimeError"
    assert pairs.summarise_response(bare, common.VERSION_NEW) == "no response in 41 ms"
    assert pairs.summarise_response(api.PairDetail(), common.VERSION_NEW) == "no capture"


@pytest.mark.parametrize("width", [100, 104, 110, 120])
def test_timeline_keeps_note_next_to_bar(width: int) -> None:
    detail = detail_of_failed_new()
    text = render(pairs.build_timeline_table(detail.captures, width), width)

    assert len(text.splitlines()) == 1 + len(detail.captures)
    assert "raised RuntimeError" in text


def test_curl_line_is_quoted_for_the_shell() -> None:
    import shlex

    line, _omissions = pairs.build_curl_line(messages.pair_detail(), "http://127.0.0.1:8002/")

    assert shlex.split(line)[-1] == "http://127.0.0.1:8002/products/7?currency=EUR&q=it's"
    assert "hmac:" not in line


@pytest.mark.parametrize(
    ("method", "body", "words"),
    [("GET", b"", []), ("HEAD", b"", ["--head"]), ("POST", b"{}", []), ("DELETE", b"", ["-X", "DELETE"])],
)
def test_curl_line_repeats_method(method: str, body: bytes, words: list[str]) -> None:
    detail = api.PairDetail(request_body=body, other_request_headers=["accept", "user-agent"])
    detail.pair.request = "/"
    detail.pair.endpoint.method = method
    line, _omissions = pairs.build_curl_line(detail)

    arguments = ["-H", "'content-type:'", "--data-raw", "'{}'"] if body else []
    assert line.split() == ["curl", "-i", *words, *arguments, '"$URL"/']


def test_curl_line_reports_omitted_binary_body() -> None:
    detail = api.PairDetail(request_body=b"\x00\xff")
    detail.pair.request = "/"
    line, omissions = pairs.build_curl_line(detail)

    assert "--data-raw" not in line
    assert omissions == ["its body (2 bytes; see --json)"]


def test_pair_prints_unified_diff_in_narrow_terminal() -> None:
    text = print_to_text(pairs.print_pair, messages.pair_detail())

    assert '-       "price": 19.99\n+       "price": "19.99"' in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("curl")) <= 80


def test_pair_prints_responses_side_by_side_in_wide_terminal() -> None:
    text = print_to_text(pairs.print_pair, messages.pair_detail(), width=120)
    line = next(line for line in text.splitlines() if '"price": "19.99"' in line)

    assert line.split() == ['"price":', "19.99", "≠", '"price":', '"19.99"']


def test_pair_prints_effects_of_both_versions() -> None:
    detail = messages.pair_detail()
    live, shadow, _ = detail.captures
    mail = api.Effect(kind="email.send", key="7", payload='{"to":"a\x1b[2J"}', error="OSError")
    mail.start.FromMicroseconds(1500)
    live.effects.append(mail)
    live.effects_dropped = 3
    shadow.effects.extend([api.Effect(kind="email.send", payload="1"), api.Effect(kind="seen", note=True)])
    rows = [" ".join(line.split()) for line in print_to_text(pairs.print_pair, detail, width=140).splitlines()]
    first = next(row for row in rows if row.startswith("old live email.send"))

    assert "\x1b" not in "".join(rows)
    assert first.startswith("old live email.send[7] +1.5 ms")
    assert first.endswith("raised OSError")
    assert "old live and 3 more not recorded" in rows
    assert "new shadow email.send +0 s 1 held back" in rows
    assert "new shadow seen +0 s note" in rows


def test_pair_without_captures_says_so() -> None:
    text = print_to_text(pairs.print_pair, api.PairDetail(pair=messages.pair_detail().pair))

    assert "the responses of this pair are not stored" in text


def test_align_headers_pairs_duplicates_in_order() -> None:
    old = api.CaptureDetail(headers=[common.Header(name="vary", value="a"), common.Header(name="vary", value="b")])
    new = api.CaptureDetail(headers=[common.Header(name="etag", value="x"), common.Header(name="vary", value="a")])

    assert pairs.align_headers(old, new) == [
        pairs.LinePair(None, "etag: x"),
        pairs.LinePair("vary: a", "vary: a"),
        pairs.LinePair("vary: b", None),
    ]


def test_truncated_body_states_missing_bytes() -> None:
    capture = api.CaptureDetail(body=b"abc", body_length=2003)

    assert pairs.split_captured_body(capture) == ["abc", "… 2.0 KB more were not captured"]


def test_compared_capture_is_first_attempt_without_baseline() -> None:
    first = api.CaptureDetail(version=common.VERSION_OLD, role=common.ROLE_SHADOW, attempt=1)
    retry = api.CaptureDetail(version=common.VERSION_OLD, role=common.ROLE_LIVE, attempt=2)
    copy = api.CaptureDetail(version=common.VERSION_OLD, role=common.ROLE_BASELINE, attempt=1)

    assert pairs.select_compared_capture([copy, retry, first], common.VERSION_OLD) is first
    assert pairs.select_compared_capture([copy], common.VERSION_OLD) is None


def test_timeline_orders_copies_by_arrival() -> None:
    captures = messages.pair_detail().captures
    text = render(pairs.build_timeline_table([*reversed(captures)], 80))

    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == ["old live", "new shadow", "old baseline"]
    assert "+400 µs" in text


def test_timeline_bar_has_at_least_one_column() -> None:
    span = pairs.TimelineSpan("new", "", arrival=1.0, first_byte=None, end=1.0)

    assert pairs.draw_bar(span, 1.0, 20).plain.strip() == pairs.WAITING_MARK
    assert len(pairs.draw_bar(span, 1.0, 20).plain) == 20


def test_traffic_change_prints_before_and_after() -> None:
    text = render(traffic.build_traffic_change_table(messages.traffic(7), messages.traffic(8, new_share=0.0)))

    assert "users on new                    25%     0%" in text


def test_traffic_prints_rules_with_their_counts() -> None:
    rules = [
        traffic_pb2.SampleRule(
            name="api", condition="POST /graphql queries", share=0.5, initial_share=1.0, sampled=1200, not_query=200
        ),
        traffic_pb2.SampleRule(name="admin", condition="/admin/*"),
    ]
    response = traffic_pb2.GetTrafficResponse(traffic=messages.traffic(), rules=rules)
    lines = print_to_text(traffic.print_traffic, response, NOW).splitlines()

    api_cells, admin_cells = (line.split() for line in lines if "graphql" in line or "/admin" in line)
    assert api_cells == ["api", "POST", "/graphql", "queries", "50%", "100%", "1,200", "200"]
    assert admin_cells == ["admin", "/admin/*", "0%", "0%", "0"]


def test_traffic_change_prints_rules_whose_share_was_set() -> None:
    before, after = messages.traffic(7), messages.traffic(8)
    after.rule_shares["api"] = 0.5
    table = render(traffic.build_traffic_change_table(before, after))
    event = traffic_pb2.TrafficEvent(before=before, after=after)

    assert [*next(line for line in table.splitlines() if "api" in line).split()] == [
        "sampling",
        "rule",
        "api",
        "as",
        "in",
        "the",
        "file",
        "50%",
    ]
    assert traffic.format_traffic_changes(event) == "sampling rule api as in the file → 50%"


def print_envoys_to_text(*envoys: traffic_pb2.EnvoyStatus, **fields: Any) -> str:
    response = traffic_pb2.GetTrafficResponse(traffic=messages.traffic(8), envoys=envoys, **fields)
    return print_to_text(traffic.print_envoys, response)


def test_envoys_table_prints_reason_of_refusal() -> None:
    text = print_envoys_to_text(messages.envoy(7, error="no such key"), messages.envoy(7))

    assert "refused: no such key" in text
    assert "not yet (at version 7 of 8)" in text


def test_envoys_table_distinguishes_equal_node_ids_by_connection() -> None:
    envoys = [messages.envoy(8, peer="ipv4:10.0.0.1:5000"), messages.envoy(8, peer="ipv4:10.0.0.2:5000")]
    text = print_envoys_to_text(*envoys)

    assert "edge-1 (ipv4:10.0.0.1:5000)" in text
    assert "edge-1 (ipv4:10.0.0.2:5000)" in text
    assert "ipv4" not in print_envoys_to_text(*envoys[:1])


def test_envoys_table_names_sidecars_if_several() -> None:
    local, remote = messages.envoy(8, sidecar="a:50051"), messages.envoy(8, sidecar="b:50051")

    assert "b:50051" in print_envoys_to_text(local, remote)
    assert "sidecar" not in print_envoys_to_text(local, local)


def test_envoys_table_reports_unreachable_sidecars() -> None:
    text = print_envoys_to_text(messages.envoy(8), peers_error="postgres is away")

    assert "the Envoys of other sidecars are unknown: postgres is away" in text


def test_traffic_marks_rollback() -> None:
    rolled_back = messages.traffic()
    rolled_back.rolled_back = True
    text = print_to_text(traffic.print_traffic, traffic_pb2.GetTrafficResponse(traffic=rolled_back), NOW)

    assert "rolled back: all users get old" in text
    assert "no Envoy is connected" in text


@pytest.mark.parametrize(
    ("copied", "expected"),
    [(1300, "65% of the selected requests had a copy (1,300 of 2,000"), (2003, "100% of the selected")],
)
def test_traffic_prints_effective_sample(copied: int, expected: str) -> None:
    sample = traffic_pb2.EffectiveSample(selected=2000, copied=copied)
    response = traffic_pb2.GetTrafficResponse(traffic=messages.traffic(), effective_sample=sample)

    assert f"effective sample: {expected}" in print_to_text(traffic.print_traffic, response, NOW)


def test_control_characters_in_captured_values_are_escaped() -> None:
    finding = messages.finding()
    finding.summary = "\x1b[2Jgone"
    text = print_to_text(findings.print_findings, api.ListFindingsResponse(findings=[finding]), width=200)

    assert "\\x1b[2Jgone" in text


def test_timeline_prints_spans_of_each_capture() -> None:
    captures = messages.pair_detail().captures
    for name, start, note in (("database", 1500, ""), ("cache", 400, "miss")):
        hop = captures[1].spans.add(kind=name, name="product", note=note)
        hop.start.FromMicroseconds(start)
        hop.duration.FromMicroseconds(800)
    lines = render(pairs.build_timeline_table(captures, 120), 120).splitlines()
    new = next(number for number, line in enumerate(lines) if line.strip().startswith("new shadow"))

    assert "dropped by Envoy" in lines[new]
    assert lines[new + 1].strip().startswith("→ cache product")
    assert lines[new + 1].endswith("miss")
    assert lines[new + 2].strip().startswith("→ database product")
    assert lines[new + 1].index("─") < lines[new + 2].index("─")


@pytest.mark.parametrize(("limit", "row_count"), [(5, 5), (None, 200)])
def test_preview_counts_first_and_prints_the_gravest(limit: int | None, row_count: int) -> None:
    response = rule_pb2.PreviewRuleResponse(
        findings=[
            rule_pb2.HiddenFinding(
                finding_id=number,
                endpoint=common.Endpoint(service="shop", method="GET", route=f"/r{number // 2}"),
                part=common.PART_BODY,
                path="$.price",
                kind=common.KIND_TYPE,
                pairs=3,
                exact=True,
                confirmed=number == 1000,
            )
            for number in range(1000, 1200)
        ],
        objections=[f"it would also hide finding {number}" for number in range(1000, 1200)],
    )
    lines = print_to_text(rules.print_preview, response, width=120, limit=limit).splitlines()

    assert lines[0] == "the rule would hide 200 findings at 100 endpoints, 1 of them confirmed"
    assert sum(line.startswith("warning: ") for line in lines) == row_count
    assert sum("$.price" in line for line in lines) == row_count
    assert ("and 195 more findings; for all: --all" in lines) == (limit is not None)
