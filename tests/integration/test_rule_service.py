"""RuleService over gRPC and `abreast rules`, in a whole sidecar with a real ledger."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import re
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from click.testing import CliRunner

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2, rule_pb2_grpc
from abreast.v1 import rule_pb2 as pb
from abreast_sidecar.cli import abreast as command
from support import eventually_async
from support_pairs import pair_of, query_value, ready, send
from support_serve import Refused, RunningSidecar, packed, refused, run_sidecar

pytestmark = pytest.mark.postgres

FAR = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url) as instance:
        yield instance


def calls(sidecar: RunningSidecar) -> rule_pb2_grpc.RuleServiceStub:
    return rule_pb2_grpc.RuleServiceStub(sidecar.channel)


def rule(action: int = pb.RULE_ACTION_IGNORE, **fields: Any) -> pb.Rule:
    rule_message = pb.Rule(action=action, **{"owner": "me", "reason": "known", **fields})  # type: ignore[arg-type]
    rule_message.expire_time.FromDatetime(FAR)
    return rule_message


async def refusal(call: Awaitable[Any]) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return refused(error.value)


async def test_rule_is_created_listed_and_deleted(sidecar: RunningSidecar) -> None:
    request = rule(path="$.meta.id", endpoint="GET /products/{id}", kind=common.KIND_CHANGED)
    created = (await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=request, actor="ann"))).rule
    rules = (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules

    assert [rule_message.id for rule_message in rules] == [created.id]
    assert created.name == "ignore $.meta.id, changed, GET /products/{id}"
    assert (created.state, created.creator, created.owner, created.reason) == (
        pb.RULE_STATE_IN_FORCE,
        "ann",
        "me",
        "known",
    )
    assert (created.path, created.part, created.kind) == ("$.meta.id", common.PART_UNSPECIFIED, common.KIND_CHANGED)

    deleted_rule = (await calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=created.id, actor="bob"))).rule
    assert (deleted_rule.state, deleted_rule.deleter) == (pb.RULE_STATE_DELETED, "bob")
    assert not (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules
    deleted = (await calls(sidecar).ListRules(pb.ListRulesRequest(include_deleted=True))).rules
    assert [rule_message.id for rule_message in deleted] == [created.id]
    repeated = await calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=created.id))
    assert repeated.rule.deleter == "bob"


async def test_list_rules_continues_at_the_page_token(sidecar: RunningSidecar) -> None:
    for number in range(3):
        await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path=f"$.a{number}")))
    first = await calls(sidecar).ListRules(pb.ListRulesRequest(page_size=2))
    second = await calls(sidecar).ListRules(pb.ListRulesRequest(page_size=2, page_token=first.next_page_token))

    assert [rule_message.path for rule_message in (*first.rules, *second.rules)] == ["$.a0", "$.a1", "$.a2"]
    assert second.next_page_token == ""


PAST = pb.Rule(action=pb.RULE_ACTION_IGNORE, path="$.a", owner="o", reason="r")
PAST.expire_time.FromDatetime(dt.datetime(2020, 1, 1, tzinfo=dt.UTC))

WRONG = [
    (rule(action=0, path="$.a"), "the rule needs an action: one of ignore, tolerate"),
    (rule(action=77, path="$.a"), "action must be one of RULE_ACTION_UNSPECIFIED, RULE_ACTION_IGNORE"),
    (rule(), "the rule covers everything: give it at least one of path, header"),
    (rule(path="$" + ".**" * 9), "path must be a pattern of 1 to 500 characters, with `**` at most 4 times"),
    (rule(path="$.a", status="abc"), "status must be a status such as 404, 4xx or 404->200, got 'abc'"),
    (rule(path="$.a", owner=" "), "owner must state who answers for the rule"),
    (rule(path="$.a", reason=""), "reason must state why the difference is known"),
    (PAST, "expire_time must be in the future, got 2020-01-01T00:00:00Z"),
    (pb.Rule(action=pb.RULE_ACTION_IGNORE, path="$.a", owner="o", reason="r"), "expire_time must be set"),
    (rule(pb.RULE_ACTION_TOLERATE, path="$.a"), "the rule needs absolute or relative"),
    (rule(pb.RULE_ACTION_TOLERATE, path="$.a", absolute=-1), "absolute must be a number that is not negative"),
    (rule(pb.RULE_ACTION_EXPECT, path="$.a", old="{"), "old must be JSON text, got '{'"),
    (rule(part=common.PART_LATENCY), "a rule can't explain latency: set the budget"),
]


async def test_create_rule_refuses_invalid_rules(sidecar: RunningSidecar) -> None:
    for invalid, message in WRONG:
        error = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=invalid)))

        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT"), message
        assert error.message.startswith(message), (error.message, message)
    assert not (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules


async def test_unknown_and_duplicate_rules_are_refused(sidecar: RunningSidecar) -> None:
    error = await refusal(calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=99)))
    no_finding = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(), finding_id=99)))
    await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.a", name="a")))
    twice = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.b", name="a"))))

    assert error.code is no_finding.code is grpc.StatusCode.NOT_FOUND
    assert (twice.code, twice.message[:26]) == (grpc.StatusCode.INVALID_ARGUMENT, "a rule named 'a' is active")


async def test_preview_lists_confirmed_findings_first(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    common_one, confirmed = ledger.finding(endpoint, "$.a.x"), ledger.finding(endpoint, "$.a.y")
    ledger.finding(endpoint, "$.b")
    for _ in range(3):
        ledger.pair(endpoint, common_one, new_release="1")
    ledger.pair(endpoint, confirmed, new_release="2")
    ledger.execute("update abreast.finding set status = 'confirmed' where id = %s", confirmed)
    preview = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(path="$.a")))
    narrow = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(path="$.a", release="1")))

    assert [(row.finding_id, row.confirmed, row.pairs, row.exact) for row in preview.findings] == [
        (confirmed, True, 1, True),
        (common_one, False, 3, True),
    ]
    assert [row.finding_id for row in narrow.findings] == [common_one]
    assert not narrow.objections
    (objection,) = preview.objections
    assert objection.startswith(f"it would hide finding {confirmed}, which is confirmed: GET")
    assert sidecar.ledger().execute("select count(*) from abreast.rule") == [(0,)]

    error = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.a"))))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RULE_TOO_BROAD")
    await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.a"), force=True))


async def test_preview_of_value_rule_uses_stored_examples(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    price = ledger.finding(endpoint, "$.price")
    for new in (1.01, 5.0):
        pair = ledger.pair(endpoint, price)
        old_side, new_side = pair_of({"price": 1.0}, {"price": new})
        ledger.example(pair, {price: 10}, packed(old_side, new_side), [])
    tolerance = rule(pb.RULE_ACTION_TOLERATE, path="$.price", absolute=0.1)
    (finding,) = (await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=tolerance))).findings
    none = rule(pb.RULE_ACTION_TOLERATE, path="$.price", absolute=0.001)

    assert (finding.exact, finding.examples, finding.hidden_examples, finding.pairs) == (False, 2, 1, 2)
    assert not (await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=none))).findings


async def test_rule_for_a_finding_covers_only_that_finding(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    endpoint, other = ledger.endpoint(), ledger.endpoint(route="/orders")
    price, below = ledger.finding(endpoint, "$.a"), ledger.finding(endpoint, "$.a.b")
    elsewhere, header = ledger.finding(other, "$.a"), ledger.finding(endpoint, "x-a", part="header")
    for finding, where in ((price, endpoint), (below, endpoint), (elsewhere, other), (header, endpoint)):
        ledger.pair(where, finding)

    bare = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(), finding_id=elsewhere))
    assert (bare.rule.path, bare.rule.endpoint, bare.rule.service) == ("$.a", "GET /orders", "shop")
    assert ([row.finding_id for row in bare.findings], list(bare.objections)) == ([elsewhere], [])
    preview = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(), finding_id=header))
    assert ([row.finding_id for row in preview.findings], list(preview.objections)) == ([header], [])

    broad = pb.CreateRuleRequest(rule=rule(path="$.a", endpoint="*"), finding_id=price)
    error = await refusal(calls(sidecar).CreateRule(broad))
    assert error.reason == "RULE_TOO_BROAD"
    for text in (
        f"it would also hide finding {below} (1 pairs): GET /products/{{id}}",
        f"it would also hide finding {elsewhere}",
        "it also covers other endpoints",
    ):
        assert text in error.message
    unrelated = pb.CreateRuleRequest(rule=rule(path="$.z"), finding_id=price)
    assert (await refusal(calls(sidecar).CreateRule(unrelated))).code is grpc.StatusCode.INVALID_ARGUMENT
    wide = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(path="$.**"), finding_id=elsewhere))
    assert list(wide.objections) == [f"it also covers other paths: finding {elsewhere} needs '$.a'"]

    broad.force = True
    assert (await calls(sidecar).CreateRule(broad)).rule.endpoint == "*"


async def test_apply_rules_replaces_the_rules_of_a_source(sidecar: RunningSidecar) -> None:
    async def apply(*rules: pb.Rule, **fields: Any) -> tuple[list[str], list[str], list[str]]:
        response = await calls(sidecar).ApplyRules(pb.ApplyRulesRequest(source="f", rules=rules, **fields))
        return tuple([row.name for row in part] for part in (response.created, response.deleted, response.unchanged))  # type: ignore[return-value]

    a, b, changed = rule(name="a", path="$.a"), rule(name="b", path="$.b"), rule(name="b", path="$.b2")
    await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(name="a", path="$.by_hand")))
    assert await apply(a, b, dry_run=True) == (["a", "b"], [], [])
    assert await apply(a, b) == (["a", "b"], [], [])
    assert await apply(a, b) == ([], [], ["a", "b"])
    assert await apply(b, dry_run=True) == ([], ["a"], ["b"])
    assert await apply(changed) == (["b"], ["a", "b"], [])

    stored = (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules
    assert [(row.name, row.path, row.source) for row in stored] == [("a", "$.by_hand", ""), ("b", "$.b2", "f")]
    assert (await refusal(apply(a, a))).message == "two rules are named 'a'"


async def test_new_rule_applies_to_stored_and_new_pairs(sidecar: RunningSidecar, redis_url: str) -> None:
    """Send pairs through Redis, worker and ledger, add a rule, and read pair, finding and summary."""
    url = sidecar.postgres_url
    for _ in range(3):
        send(redis_url, pair_of({"price": 1, "id": 1}, {"price": 2, "id": 2}))

    async def has_pairs() -> bool:
        return ready(redis_url) == 0 and query_value(url, "select count(*) from abreast.pair") == 3

    await eventually_async(has_pairs, description="three pairs are in the ledger")
    finding = query_value(url, "select id from abreast.finding where path = '$.id'")
    created = await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(), finding_id=finding))
    late = pair_of({"price": 1, "id": 1}, {"price": 1, "id": 2})
    send(redis_url, late)

    async def is_applied() -> bool:
        rules = (await calls(sidecar).ListRules(pb.ListRulesRequest(finding_id=finding))).rules
        return bool(rules) and rules[0].reapplied and rules[0].pairs == 4

    await eventually_async(is_applied, description="all is judged by the rule")
    pair = (await sidecar.comparison.GetPair(comparison_pb2.GetPairRequest(id=late[0].pair))).pair
    assert [(row.finding_id, row.rule_id) for row in pair.pair.explained] == [(finding, created.rule.id)]
    assert list(pair.pair.finding_ids) == []
    response = await sidecar.comparison.GetFinding(comparison_pb2.GetFindingRequest(id=finding))
    assert (response.finding.count, [row.id for row in response.explained_by]) == (0, [created.rule.id])
    assert {row.explained_by for row in response.examples[0].differences if row.path == "$.id"} == {created.rule.id}
    summary = await sidecar.comparison.GetSummary(comparison_pb2.GetSummaryRequest(service="shop"))
    assert summary.explained == 1
    await stays_listed(sidecar, finding, created.rule)

    await calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=created.rule.id))

    async def back() -> bool:
        response = await sidecar.comparison.GetFinding(comparison_pb2.GetFindingRequest(id=finding))
        return bool(response.finding.count == 4 and not response.explained_by)

    await eventually_async(back, description="the finding is back")


async def stays_listed(sidecar: RunningSidecar, finding: int, created: pb.Rule) -> None:
    """Check the listing of an explained finding, with and without a time window."""
    day = common.TimeWindow()
    day.start.FromDatetime(dt.datetime.now(dt.UTC) - dt.timedelta(days=1))
    for window in (None, day):
        request = comparison_pb2.ListFindingsRequest(only_explained=True, window=window)
        findings = [
            finding_row
            for finding_row in (await sidecar.comparison.ListFindings(request)).findings
            if finding_row.id == finding
        ]
        everything = comparison_pb2.ListFindingsRequest(include_settled=True, window=window)
        open_ones = comparison_pb2.ListFindingsRequest(include_noise=True, window=window)

        ((explanation,),) = ([*finding_row.explanations] for finding_row in findings)
        assert (explanation.cause, explanation.pairs) == (comparison_pb2.EXPLANATION_CAUSE_RULE, 4)
        assert (explanation.rule_id, explanation.rule_name, explanation.owner, explanation.reason) == (
            *(created.id, created.name, created.owner, created.reason),
        )
        assert finding in {
            finding_row.id for finding_row in (await sidecar.comparison.ListFindings(everything)).findings
        }
        assert finding not in {
            finding_row.id for finding_row in (await sidecar.comparison.ListFindings(open_ones)).findings
        }
    pairs = await sidecar.comparison.ListPairs(comparison_pb2.ListPairsRequest(finding_id=finding))
    assert len(pairs.pairs) == 4
    _, output, _ = await abreast(sidecar, "findings", "--explained")
    assert re.search(rf"\b{finding}  rule +4 .*{re.escape(created.reason)}", output)
    page = (await sidecar.http.get("/")).text
    assert page.index("Explained") < page.index(f"rule {created.id} (")


FILE = """
rules:
  - {name: ids, action: ignore, path: $.id, owner: me, reason: random, expires: 2099-01-31}
  - {name: cents, action: tolerate, path: $.price, relative: 1%, owner: me, reason: rounding, expires: 2099-01-31}
"""


LOG = re.compile(r"^\d{4}-\d\d-\d\d \d.*\n", re.MULTILINE)  # logs of the sidecar, which runs in this process


async def abreast(sidecar: RunningSidecar, *words: str, cwd: Path | None = None) -> tuple[int, str, str]:
    with contextlib.chdir(cwd or Path.cwd()):
        result = await asyncio.to_thread(
            CliRunner().invoke, command, [*words, "--address", f"127.0.0.1:{sidecar.port}"]
        )
    return int(result.exit_code), LOG.sub("", result.stdout), result.stderr


DOC = Path(__file__).parents[2] / "docs/rules.md"


async def test_rule_examples_in_docs_are_exact(sidecar: RunningSidecar, tmp_path: Path) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    finding = ledger.finding(endpoint, "$.meta.request_id")
    ledger.pair(endpoint, finding)
    text = DOC.read_text()
    examples = dict(re.findall(r"^\$ abreast (.+)\n((?:(?!\$ |```).+\n)+)", text, re.MULTILINE))
    (file,) = re.findall(r"```yaml\n# rules.yaml\n(.+?)```", text, re.DOTALL)
    (tmp_path / "rules.yaml").write_text(file)

    assert len(examples) == 4
    for line, printed in examples.items():
        words = shlex.split(line.replace("--for 12", f"--for {finding}"))
        if "check" in words:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "abreast_sidecar", *words), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
            )
            output = (await process.communicate())[0].decode()
        else:
            output = (await abreast(sidecar, *words, cwd=tmp_path))[1]
        assert output == printed


async def test_rules_commands_import_export_add_and_delete(sidecar: RunningSidecar, tmp_path: Path) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    finding = ledger.finding(endpoint, "$.id")
    ledger.pair(endpoint, finding)
    file = tmp_path / "shop.yaml"
    file.write_text(FILE)

    code, out, _ = await abreast(sidecar, "rules", "import", str(file), "--dry-run")
    assert (code, out) == (0, "+ ids\n+ cents\n2 created, 0 deleted, 0 unchanged\n")
    code, out, _ = await abreast(sidecar, "rules", "import", str(file))
    assert (code, out.splitlines()[-1]) == (0, "2 created, 0 deleted, 0 unchanged")
    code, out, _ = await abreast(sidecar, "rules", "export", "--source", "shop.yaml")
    assert [row["name"] for row in yaml.safe_load(out)["rules"]] == ["ids", "cents"]
    copy = tmp_path / "copy" / "shop.yaml"
    copy.parent.mkdir()
    copy.write_text(out)
    code, out, _ = await abreast(sidecar, "rules", "import", str(copy))
    assert (code, out) == (0, "0 created, 0 deleted, 2 unchanged\n")

    code, out, err = await abreast(
        sidecar,
        *("rules", "add", "expect", "--for", str(finding), "--path", "$.**", "--owner", "me"),
        *("--reason", "r", "--expires", "90d"),
    )
    assert (code, out) == (5, "")
    assert "it also covers other paths" in err
    code, out, _ = await abreast(sidecar, "rules", "preview", "ignore", "--path", "$.id")
    assert code == 0
    code, out, _ = await abreast(sidecar, "rules", "delete", "1")
    assert (code, out) == (0, "rule 1 (ids) is deleted, and stored pairs are being evaluated without it\n")
    code, out, _ = await abreast(sidecar, "rules", "list")
    assert (code, "cents" in out, "ids" in out) == (0, True, False)
