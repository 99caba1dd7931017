"""What the commands print, from messages alone, at the width of a narrow terminal and of a wide one."""

from __future__ import annotations

import datetime as dt
import io
from typing import Any

import pytest

import support_sidecar as prepared
from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli import endpoints, findings, status, traffic, verdict
from abreast_sidecar.cli import findings as finding
from abreast_sidecar.cli import pairs as answers
from abreast_sidecar.cli import pairs as curl
from abreast_sidecar.cli import pairs as pair
from abreast_sidecar.cli import pairs as timeline
from abreast_sidecar.cli import traffic as shift
from abreast_sidecar.client.output import Console
from support_sidecar import NOW


def printed(show: Any, *arguments: Any, width: int = 80, **options: Any) -> str:
    """With trailing blanks removed."""
    out = Console(file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False)
    show(out, *arguments, **options)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def rendered(renderable: Any, width: int = 80) -> str:
    return printed(lambda out: out.print(renderable), width=width)


def test_status_says_how_requests_ended_and_what_is_missing() -> None:
    text = printed(
        status.print_status, prepared.summary(), traffic_pb2.GetTrafficResponse(traffic=prepared.traffic()), NOW
    )

    assert text == (
        "shop\n"
        "users: 75% old, 25% new · mirrored: 10% of safe requests, 0% of others\n"
        "\n"
        "outcome   requests  share\n"
        "match        1,204  93.1%\n"
        "mismatch        83   6.4%  12 of them noise or additive only\n"
        "only old         6   0.5%\n"
        "\n"
        "1,293 requests in 11 min 58 s, the last 2 s ago\n"
        "\n"
        "sampled by Envoy  1,295  2 on their way\n"
        "pending           2      wait for a copy or a worker\n"
        "dropped           3      service queue_bytes 3\n"
        "late              3      captures that came after their pair had been compared\n"
        "put apart         4      a capture of format 2 can't be read\n"
        "findings          7      see: abreast findings"
    )


@pytest.mark.parametrize(
    ("sampled", "unaccounted", "told"),
    [
        (1_000, 0, "all of them are in the ledger"),
        (1_000, 20, "20 on their way"),
        (1_000, 21, "21 of them are on their way, or lost"),
        (9_000, 90, "90 on their way"),
        (1_000, -3, "3 more on their way from Envoy"),
        (1_000, -300, "300 fewer than in the ledger: an Envoy's count is missing or late"),
    ],
)
def test_status_raises_no_alarm_over_a_moment_of_traffic(sampled: int, unaccounted: int, told: str) -> None:
    summary = prepared.summary()
    summary.envoy_sampled, summary.unaccounted = sampled, unaccounted
    text = printed(status.print_status, summary, None, NOW, width=120)

    assert f"sampled by Envoy  {sampled:,}  {told}\n" in text


@pytest.mark.parametrize(
    ("pending", "age", "told"),
    [
        (0, 31, "2 of them did not come, and nothing is on its way"),
        (1, 31, "2 on their way"),
        (0, 29, "2 on their way"),
    ],
)
def test_status_calls_nothing_on_its_way_when_all_is_quiet(pending: int, age: int, told: str) -> None:
    summary = prepared.summary()
    summary.envoy_sampled, summary.unaccounted, summary.pending = 1_000, 2, pending
    summary.last_pair_time.FromDatetime(NOW - dt.timedelta(seconds=age))
    text = printed(status.print_status, summary, None, NOW, width=120)

    assert f"sampled by Envoy  1,000  {told}\n" in text


@pytest.mark.parametrize(
    ("ahead", "told"),
    [
        (34_560_000, "Postgres's is 400 d ahead of the sidecar's: synchronise them"),
        (-3600, "Postgres's is 1 h behind the sidecar's: synchronise them"),
        (299, ""),
    ],
)
def test_status_says_that_clocks_are_apart(ahead: int, told: str) -> None:
    summary = prepared.summary()
    summary.ledger_clock_ahead.FromSeconds(ahead)
    text = printed(status.print_status, summary, None, NOW, width=120)

    assert (f"clocks            !      {told}\n" in text) if told else ("clocks" not in text)


def test_status_of_an_empty_ledger_points_to_the_doctor() -> None:
    text = printed(status.print_status, api.GetSummaryResponse(service="shop"), None, NOW)

    assert "nothing has been compared yet" in text
    assert "abreast doctor" in text
    assert "no Envoy's admin address is known" in " ".join(text.split())


def test_status_says_what_is_not_known() -> None:
    summary = prepared.summary()
    for name in ("pending", "envoy_sampled", "unaccounted"):
        summary.ClearField(name)
    text = printed(status.print_status, summary, None, NOW)

    assert "pending           ?" in text
    assert "sampled by Envoy  ?" in text


def test_endpoints_fit_a_narrow_terminal() -> None:
    text = rendered(endpoints.build_endpoints_table(prepared.answers()["ListEndpoints"]))  # type: ignore[arg-type]

    assert "GET /products/{id}     1,204   100%         2  3.1 ms    -  12 ms    -" in text


def test_findings_stack_endpoint_and_place_in_a_narrow_terminal() -> None:
    text = printed(findings.print_findings, api.ListFindingsResponse(findings=[prepared.finding()]))

    assert text.splitlines() == [
        "id  impact       requests  where               difference",
        '12  breaking  83   (6.9%)  GET /products/{id}  19.99 became "19.99"',
        "                             $.items[*].price",
    ]


def test_findings_are_one_row_each_when_piped() -> None:
    text = printed(findings.print_findings, api.ListFindingsResponse(findings=[prepared.finding()]), width=400)

    assert text.splitlines()[1:] == [
        '12  breaking  83   (6.9%)  GET /products/{id}  $.items[*].price  19.99 became "19.99"'
    ]


def test_noise_is_marked_and_services_are_named_where_there_are_several() -> None:
    noise = api.FindingExplanation(cause=api.EXPLANATION_CAUSE_NOISE, pairs=83)
    other = prepared.finding(13, noise=True, explanations=[noise])
    other.endpoint.service = "cart"
    text = printed(findings.print_findings, api.ListFindingsResponse(findings=[prepared.finding(), other]), width=400)

    assert "noise" in text.splitlines()[2]
    assert "cart: GET /products/{id}" in text


def test_a_finding_says_what_its_requests_have_in_common() -> None:
    feature = api.RequestFeature(text="query.currency=JPY", coverage=1.0, precision=0.5)
    text = printed(
        finding.print_finding, api.GetFindingResponse(finding=prepared.finding(), feature=feature), NOW, width=160
    )

    said = "query.currency=JPY: 100% of the requests that show it, and 50.0% of those with it show it"
    assert f"only with   {said}" in text


def test_what_is_undecided_says_so() -> None:
    undecided = prepared.finding(state=api.FINDING_STATE_UNDECIDED)
    text = printed(findings.print_findings, api.ListFindingsResponse(findings=[undecided]), width=400)

    assert '19.99 became "19.99" (not yet told from noise)' in text
    assert finding.format_noise_state(undecided).startswith("not decided yet: new differs in 83")


def test_a_verdict_gives_its_reasons_and_what_it_takes() -> None:
    assert printed(verdict.print_verdict, prepared.verdict(), width=160).splitlines() == [
        "INCONCLUSIVE  shop  about 2,500 more pairs to pass, at the present rates",
        "INCONCLUSIVE  coverage    GET /products/{id}: old answered 7 requests, new none",
        "INCONCLUSIVE  mismatches  0 of 1,000 pairs have unexplained mismatches: 0% (0% to 0.4%), 0.1% allowed",
        "",
        "by themselves, 1 of 2 endpoints pass",
        "endpoint            verdict       why",
        "GET /products/{id}  INCONCLUSIVE  old answered 7 requests, new none",
    ]


@pytest.mark.parametrize(
    ("state", "more", "said"),
    [
        (api.VERDICT_STATE_PASS, 0, ""),
        (api.VERDICT_STATE_FAIL, None, ""),
        (api.VERDICT_STATE_INCONCLUSIVE, 0, ""),
        (api.VERDICT_STATE_INCONCLUSIVE, None, "more of the same would not make it pass"),
    ],
)
def test_how_many_more_are_said_where_it_helps(state: api.VerdictState.ValueType, more: int | None, said: str) -> None:
    assert verdict.format_pairs_to_pass(api.GetVerdictResponse(state=state, pairs_needed=more)) == said


def test_long_paths_are_folded_never_cut() -> None:
    long = prepared.finding()
    long.path = "$." + ".".join(f"part{n}" for n in range(20))
    text = printed(findings.print_findings, api.ListFindingsResponse(findings=[long]))

    assert max(map(len, text.splitlines())) <= 80
    assert "part19" in "".join(text.split())


def test_a_finding_shows_an_example_to_try() -> None:
    found = api.GetFindingResponse(finding=prepared.finding(), examples=[prepared.pair_detail()])
    text = printed(finding.print_finding, found, NOW, url="http://127.0.0.1:8002", width=120)

    assert text.splitlines()[:6] == [
        "#12  breaking  GET /products/{id}  $.items[*].price",
        "service     shop",
        'difference  19.99 became "19.99" (type)',
        "requests    83 of 1,204 compared (6.9%)",
        "seen        first 5 min ago, last 2 s ago",
        "noise       no: new differs in 83 of 1204, old from itself in 0 of 120: more than chance",
    ]
    assert "without its authorization (a secret, kept as a hash only)" in text
    assert "old 200 in 3.1 ms, new 200 in 41 ms; the user got old's" in text
    assert '$.items[0].price  type  breaking  19.99  "19.99"' in text


def failed() -> api.PairDetail:
    """New raised before it answered."""
    detail = prepared.pair_detail()
    detail.pair.new_status = 0
    new = detail.captures[1]
    new.status, new.exception, new.body, new.body_length = 0, "RuntimeError", b"", 0
    new.ClearField("headers")
    new.ClearField("first_byte")
    return detail


def test_an_exception_is_told_by_name() -> None:
    found = api.GetFindingResponse(finding=prepared.finding(), examples=[failed()])

    assert "new       raised RuntimeError in 41 ms, release 2.0.0\n" in printed(pair.print_pair, failed(), width=120)
    assert "new raised RuntimeError in 41 ms; the user" in printed(finding.print_finding, found, NOW, width=120)


def test_how_a_version_ended_as_far_as_it_is_kept() -> None:
    detail = failed()
    late = failed()
    late.pair.new_status = 200
    bare = api.PairDetail(pair=detail.pair)

    assert answers.summarise_answer(late, common.VERSION_NEW) == "200 in 41 ms, then raised RuntimeError"
    assert answers.summarise_answer(bare, common.VERSION_NEW) == "no answer in 41 ms"
    assert answers.summarise_answer(api.PairDetail(), common.VERSION_NEW) == "no capture"


@pytest.mark.parametrize("width", [100, 104, 110, 120])
def test_the_timeline_keeps_a_note_beside_its_bar(width: int) -> None:
    detail = failed()
    text = rendered(timeline.build_timeline_table(detail.captures, width), width)

    assert len(text.splitlines()) == 1 + len(detail.captures)
    assert "raised RuntimeError" in text


def test_curl_quotes_for_the_shell() -> None:
    import shlex

    line, _lacks = curl.build_curl_line(prepared.pair_detail(), "http://127.0.0.1:8002/")

    assert shlex.split(line)[-1] == "http://127.0.0.1:8002/products/7?currency=EUR&q=it's"
    assert "hmac:" not in line


@pytest.mark.parametrize(
    ("method", "body", "words"),
    [("GET", b"", []), ("HEAD", b"", ["--head"]), ("POST", b"{}", []), ("DELETE", b"", ["-X", "DELETE"])],
)
def test_curl_repeats_the_method(method: str, body: bytes, words: list[str]) -> None:
    detail = api.PairDetail(request_body=body)
    detail.pair.endpoint.method = method
    line, _lacks = curl.build_curl_line(detail)

    sent = ["-H", "'content-type:'", "--data-raw", "'{}'"] if body else []
    assert line.split() == ["curl", "-i", *words, *sent, "\"$URL\"''"]


def test_curl_says_when_it_lacks_a_body_that_is_no_text() -> None:
    line, lacks = curl.build_curl_line(api.PairDetail(request_body=b"\x00\xff"))

    assert "--data-raw" not in line
    assert lacks == ["its body (2 bytes; see --json)"]


def test_a_pair_shows_both_answers_below_each_other_in_a_narrow_terminal() -> None:
    text = printed(pair.print_pair, prepared.pair_detail())

    assert '-       "price": 19.99\n+       "price": "19.99"' in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("curl")) <= 80


def test_a_pair_shows_both_answers_side_by_side_in_a_wide_terminal() -> None:
    text = printed(pair.print_pair, prepared.pair_detail(), width=120)
    line = next(line for line in text.splitlines() if '"price": "19.99"' in line)

    assert line.split() == ['"price":', "19.99", "≠", '"price":', '"19.99"']


def test_a_pair_shows_what_both_did_beside_their_answers() -> None:
    detail = prepared.pair_detail()
    live, shadow, _ = detail.captures
    mail = api.Effect(kind="email.send", key="7", payload='{"to":"a\x1b[2J"}', error="OSError")
    mail.start.FromMicroseconds(1500)
    live.effects.append(mail)
    live.effects_dropped = 3
    shadow.effects.extend([api.Effect(kind="email.send", payload="1"), api.Effect(kind="seen", note=True)])
    rows = [" ".join(line.split()) for line in printed(pair.print_pair, detail, width=140).splitlines()]
    first = next(row for row in rows if row.startswith("old live email.send"))

    assert "\x1b" not in "".join(rows)
    assert first.startswith("old live email.send[7] +1.5 ms")
    assert first.endswith("raised OSError")
    assert "old live and 3 more not recorded" in rows
    assert "new shadow email.send +0 s 1 held back" in rows
    assert "new shadow seen +0 s note" in rows


def test_a_pair_that_is_not_kept_says_so() -> None:
    text = printed(pair.print_pair, api.PairDetail(pair=prepared.pair_detail().pair))

    assert "the answers are not kept" in text


def test_headers_are_aligned_by_name_with_duplicates() -> None:
    old = api.CaptureDetail(headers=[common.Header(name="vary", value="a"), common.Header(name="vary", value="b")])
    new = api.CaptureDetail(headers=[common.Header(name="etag", value="x"), common.Header(name="vary", value="a")])

    assert answers.align_headers(old, new) == [
        answers.LinePair(None, "etag: x"),
        answers.LinePair("vary: a", "vary: a"),
        answers.LinePair("vary: b", None),
    ]


def test_a_body_that_was_cut_says_how_much_is_missing() -> None:
    capture = api.CaptureDetail(body=b"abc", body_length=2003)

    assert answers.split_captured_body(capture) == ["abc", "… 2.0 KB more were not captured"]


def test_the_retry_and_the_baseline_copy_are_not_what_was_compared() -> None:
    first = api.CaptureDetail(version=common.VERSION_OLD, role=common.ROLE_SHADOW, attempt=1)
    retry = api.CaptureDetail(version=common.VERSION_OLD, role=common.ROLE_LIVE, attempt=2)
    copy = api.CaptureDetail(version=common.VERSION_OLD, role=common.ROLE_BASELINE, attempt=1)

    assert answers.select_compared_capture([copy, retry, first], common.VERSION_OLD) is first
    assert answers.select_compared_capture([copy], common.VERSION_OLD) is None


def test_the_timeline_has_a_row_for_each_copy_by_arrival() -> None:
    captures = prepared.pair_detail().captures
    text = rendered(timeline.build_timeline_table([*reversed(captures)], 80))

    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == ["old live", "new shadow", "old baseline"]
    assert "+400 µs" in text


def test_bars_are_never_invisible() -> None:
    span = timeline.TimelineSpan("new", "", arrival=1.0, first_byte=None, end=1.0)

    assert timeline.draw_bar(span, 1.0, 20).plain.strip() == timeline.WAITING_MARK
    assert len(timeline.draw_bar(span, 1.0, 20).plain) == 20


def test_a_change_shows_before_and_after_and_who_has_it() -> None:
    text = rendered(shift.build_traffic_change_table(prepared.traffic(7), prepared.traffic(8, new_share=0.0)))

    assert "users on new                    25%     0%" in text


def shown(*envoys: traffic_pb2.EnvoyStatus, **fields: Any) -> str:
    found = traffic_pb2.GetTrafficResponse(traffic=prepared.traffic(8), envoys=envoys, **fields)
    return printed(shift.print_envoys, found)


def test_an_envoy_that_refuses_is_named_with_its_reason() -> None:
    text = shown(prepared.envoy(7, error="no such key"), prepared.envoy(7))

    assert "refused: no such key" in text
    assert "not yet (has version 7 of 8)" in text


def test_envoys_that_share_a_node_id_are_told_apart_by_their_connections() -> None:
    envoys = [prepared.envoy(8, peer="ipv4:10.0.0.1:5000"), prepared.envoy(8, peer="ipv4:10.0.0.2:5000")]
    text = shown(*envoys)

    assert "edge-1 (ipv4:10.0.0.1:5000)" in text
    assert "edge-1 (ipv4:10.0.0.2:5000)" in text
    assert "ipv4" not in shown(*envoys[:1])


def test_envoys_of_several_sidecars_are_shown_with_the_name_of_theirs() -> None:
    here, there = prepared.envoy(8, sidecar="a:50051"), prepared.envoy(8, sidecar="b:50051")

    assert "b:50051" in shown(here, there)
    assert "sidecar" not in shown(here, here)


def test_that_other_sidecars_could_not_be_asked_is_said() -> None:
    text = shown(prepared.envoy(8), peers_error="postgres is away")

    assert "Envoys of other sidecars are not known: postgres is away" in text


def test_traffic_says_that_users_were_sent_back() -> None:
    rolled_back = prepared.traffic()
    rolled_back.rolled_back = True
    text = printed(traffic.print_traffic, traffic_pb2.GetTrafficResponse(traffic=rolled_back), NOW)

    assert "rolled back: all users get old" in text
    assert "no Envoy is connected" in text


def test_control_characters_in_captured_values_stay_visible() -> None:
    evil = prepared.finding()
    evil.summary = "\x1b[2Jgone"
    text = printed(findings.print_findings, api.ListFindingsResponse(findings=[evil]), width=200)

    assert "\\x1b[2Jgone" in text


def test_the_timeline_shows_what_each_version_asked_of_others() -> None:
    captures = prepared.pair_detail().captures
    for name, start, note in (("database", 1500, ""), ("cache", 400, "miss")):
        hop = captures[1].spans.add(kind=name, name="product", note=note)
        hop.start.FromMicroseconds(start)
        hop.duration.FromMicroseconds(800)
    lines = rendered(timeline.build_timeline_table(captures, 120), 120).splitlines()
    new = next(number for number, line in enumerate(lines) if line.strip().startswith("new shadow"))

    assert "dropped by Envoy" in lines[new]
    assert lines[new + 1].strip().startswith("→ cache product")
    assert lines[new + 1].endswith("miss")
    assert lines[new + 2].strip().startswith("→ database product")
    assert lines[new + 1].index("─") < lines[new + 2].index("─")
