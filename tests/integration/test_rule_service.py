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
from support_pairs import one, pair_of, ready, send
from support_serve import Refused, Running, packed, refused, running

pytestmark = pytest.mark.postgres

FAR = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url) as found:
        yield found


def calls(sidecar: Running) -> rule_pb2_grpc.RuleServiceStub:
    return rule_pb2_grpc.RuleServiceStub(sidecar.channel)


def rule(action: int = pb.RULE_ACTION_IGNORE, **fields: Any) -> pb.Rule:
    made = pb.Rule(action=action, **{"owner": "me", "reason": "known", **fields})  # type: ignore[arg-type]
    made.expire_time.FromDatetime(FAR)
    return made


async def refusal(call: Awaitable[Any]) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refused(caught.value)


async def test_rule_is_created_listed_and_deleted(sidecar: Running) -> None:
    asked = rule(path="$.meta.id", endpoint="GET /products/{id}", kind=common.KIND_CHANGED)
    made = (await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=asked, actor="ann"))).rule
    listed = (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules

    assert [difference.id for difference in listed] == [made.id]
    assert made.name == "ignore $.meta.id, changed, GET /products/{id}"
    assert (made.state, made.creator, made.owner, made.reason) == (pb.RULE_STATE_IN_FORCE, "ann", "me", "known")
    assert (made.path, made.part, made.kind) == ("$.meta.id", common.PART_UNSPECIFIED, common.KIND_CHANGED)

    gone = (await calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=made.id, actor="bob"))).rule
    assert (gone.state, gone.deleter) == (pb.RULE_STATE_DELETED, "bob")
    assert not (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules
    deleted = (await calls(sidecar).ListRules(pb.ListRulesRequest(include_deleted=True))).rules
    assert [difference.id for difference in deleted] == [made.id]
    again = await calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=made.id))
    assert again.rule.deleter == "bob"


async def test_list_rules_continues_at_the_page_token(sidecar: Running) -> None:
    for number in range(3):
        await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path=f"$.a{number}")))
    first = await calls(sidecar).ListRules(pb.ListRulesRequest(page_size=2))
    rest = await calls(sidecar).ListRules(pb.ListRulesRequest(page_size=2, page_token=first.next_page_token))

    assert [difference.path for difference in (*first.rules, *rest.rules)] == ["$.a0", "$.a1", "$.a2"]
    assert rest.next_page_token == ""


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


async def test_create_rule_refuses_invalid_rules(sidecar: Running) -> None:
    for asked, message in WRONG:
        found = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=asked)))

        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT"), message
        assert found.message.startswith(message), (found.message, message)
    assert not (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules


async def test_unknown_and_duplicate_rules_are_refused(sidecar: Running) -> None:
    gone = await refusal(calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=99)))
    no_finding = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(), finding_id=99)))
    await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.a", name="a")))
    twice = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.b", name="a"))))

    assert gone.code is no_finding.code is grpc.StatusCode.NOT_FOUND
    assert (twice.code, twice.message[:26]) == (grpc.StatusCode.INVALID_ARGUMENT, "a rule named 'a' is active")


async def test_preview_lists_confirmed_findings_first(sidecar: Running) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    common_one, confirmed = ledger.finding(endpoint, "$.a.x"), ledger.finding(endpoint, "$.a.y")
    ledger.finding(endpoint, "$.b")
    for _ in range(3):
        ledger.pair(endpoint, common_one, new_release="1")
    ledger.pair(endpoint, confirmed, new_release="2")
    ledger.execute("update abreast.finding set status = 'confirmed' where id = %s", confirmed)
    found = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(path="$.a")))
    narrow = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(path="$.a", release="1")))

    assert [(row.finding_id, row.confirmed, row.pairs, row.exact) for row in found.findings] == [
        (confirmed, True, 1, True),
        (common_one, False, 3, True),
    ]
    assert [row.finding_id for row in narrow.findings] == [common_one]
    assert not narrow.objections
    (objection,) = found.objections
    assert objection.startswith(f"it would hide finding {confirmed}, which is confirmed: GET")
    assert sidecar.ledger().execute("select count(*) from abreast.rule") == [(0,)]

    kept = await refusal(calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.a"))))
    assert (kept.code, kept.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RULE_TOO_BROAD")
    await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(path="$.a"), force=True))


async def test_preview_of_value_rule_uses_stored_examples(sidecar: Running) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    price = ledger.finding(endpoint, "$.price")
    for new in (1.01, 5.0):
        pair = ledger.pair(endpoint, price)
        old_side, new_side = pair_of({"price": 1.0}, {"price": new})
        ledger.example(pair, {price: 10}, packed(old_side, new_side), [])
    asked = rule(pb.RULE_ACTION_TOLERATE, path="$.price", absolute=0.1)
    (found,) = (await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=asked))).findings
    none = rule(pb.RULE_ACTION_TOLERATE, path="$.price", absolute=0.001)

    assert (found.exact, found.examples, found.hidden_examples, found.pairs) == (False, 2, 1, 2)
    assert not (await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=none))).findings


async def test_rule_for_a_finding_covers_only_that_finding(sidecar: Running) -> None:
    ledger = sidecar.ledger()
    endpoint, other = ledger.endpoint(), ledger.endpoint(route="/orders")
    price, below = ledger.finding(endpoint, "$.a"), ledger.finding(endpoint, "$.a.b")
    elsewhere, header = ledger.finding(other, "$.a"), ledger.finding(endpoint, "x-a", part="header")
    for finding, where in ((price, endpoint), (below, endpoint), (elsewhere, other), (header, endpoint)):
        ledger.pair(where, finding)

    bare = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(), finding_id=elsewhere))
    assert (bare.rule.path, bare.rule.endpoint, bare.rule.service) == ("$.a", "GET /orders", "shop")
    assert ([row.finding_id for row in bare.findings], list(bare.objections)) == ([elsewhere], [])
    named = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(), finding_id=header))
    assert ([row.finding_id for row in named.findings], list(named.objections)) == ([header], [])

    broad = pb.CreateRuleRequest(rule=rule(path="$.a", endpoint="*"), finding_id=price)
    found = await refusal(calls(sidecar).CreateRule(broad))
    assert found.reason == "RULE_TOO_BROAD"
    for said in (
        f"it would also hide finding {below} (1 pairs): GET /products/{{id}}",
        f"it would also hide finding {elsewhere}",
        "it also covers other endpoints",
    ):
        assert said in found.message
    unrelated = pb.CreateRuleRequest(rule=rule(path="$.z"), finding_id=price)
    assert (await refusal(calls(sidecar).CreateRule(unrelated))).code is grpc.StatusCode.INVALID_ARGUMENT
    wide = await calls(sidecar).PreviewRule(pb.PreviewRuleRequest(rule=rule(path="$.**"), finding_id=elsewhere))
    assert list(wide.objections) == [f"it also covers other paths: finding {elsewhere} needs '$.a'"]

    broad.force = True
    assert (await calls(sidecar).CreateRule(broad)).rule.endpoint == "*"


async def test_apply_rules_replaces_the_rules_of_a_source(sidecar: Running) -> None:
    async def apply(*rules: pb.Rule, **more: Any) -> tuple[list[str], list[str], list[str]]:
        found = await calls(sidecar).ApplyRules(pb.ApplyRulesRequest(source="f", rules=rules, **more))
        return tuple([row.name for row in part] for part in (found.created, found.deleted, found.unchanged))  # type: ignore[return-value]

    a, b, changed = rule(name="a", path="$.a"), rule(name="b", path="$.b"), rule(name="b", path="$.b2")
    await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(name="a", path="$.by_hand")))
    assert await apply(a, b, dry_run=True) == (["a", "b"], [], [])
    assert await apply(a, b) == (["a", "b"], [], [])
    assert await apply(a, b) == ([], [], ["a", "b"])
    assert await apply(b, dry_run=True) == ([], ["a"], ["b"])
    assert await apply(changed) == (["b"], ["a", "b"], [])

    held = (await calls(sidecar).ListRules(pb.ListRulesRequest())).rules
    assert [(row.name, row.path, row.source) for row in held] == [("a", "$.by_hand", ""), ("b", "$.b2", "f")]
    assert (await refusal(apply(a, a))).message == "two rules are named 'a'"


async def test_new_rule_applies_to_stored_and_new_pairs(sidecar: Running, redis_url: str) -> None:
    """Send pairs through Redis, worker and ledger, add a rule, and read pair, finding and summary."""
    url = sidecar.postgres_url
    for _ in range(3):
        send(redis_url, pair_of({"price": 1, "id": 1}, {"price": 2, "id": 2}))

    async def arrived() -> bool:
        return ready(redis_url) == 0 and one(url, "select count(*) from abreast.pair") == 3

    await eventually_async(arrived, what="three pairs are in the ledger")
    finding = one(url, "select id from abreast.finding where path = '$.id'")
    made = await calls(sidecar).CreateRule(pb.CreateRuleRequest(rule=rule(), finding_id=finding))
    late = pair_of({"price": 1, "id": 1}, {"price": 1, "id": 2})
    send(redis_url, late)

    async def judged() -> bool:
        listed = (await calls(sidecar).ListRules(pb.ListRulesRequest(finding_id=finding))).rules
        return bool(listed) and listed[0].reapplied and listed[0].pairs == 4

    await eventually_async(judged, what="all is judged by the rule")
    pair = (await sidecar.comparison.GetPair(comparison_pb2.GetPairRequest(id=late[0].pair))).pair
    assert [(row.finding_id, row.rule_id) for row in pair.pair.explained] == [(finding, made.rule.id)]
    assert list(pair.pair.finding_ids) == []
    shown = await sidecar.comparison.GetFinding(comparison_pb2.GetFindingRequest(id=finding))
    assert (shown.finding.count, [row.id for row in shown.explained_by]) == (0, [made.rule.id])
    assert {row.explained_by for row in shown.examples[0].differences if row.path == "$.id"} == {made.rule.id}
    summary = await sidecar.comparison.GetSummary(comparison_pb2.GetSummaryRequest(service="shop"))
    assert summary.explained == 1
    await stays_listed(sidecar, finding, made.rule)

    await calls(sidecar).DeleteRule(pb.DeleteRuleRequest(id=made.rule.id))

    async def back() -> bool:
        found = await sidecar.comparison.GetFinding(comparison_pb2.GetFindingRequest(id=finding))
        return bool(found.finding.count == 4 and not found.explained_by)

    await eventually_async(back, what="the finding is back")


async def stays_listed(sidecar: Running, finding: int, made: pb.Rule) -> None:
    """Check the listing of an explained finding, with and without a time window."""
    day = common.TimeWindow()
    day.start.FromDatetime(dt.datetime.now(dt.UTC) - dt.timedelta(days=1))
    for window in (None, day):
        asked = comparison_pb2.ListFindingsRequest(only_explained=True, window=window)
        listed = [
            difference
            for difference in (await sidecar.comparison.ListFindings(asked)).findings
            if difference.id == finding
        ]
        everything = comparison_pb2.ListFindingsRequest(include_settled=True, window=window)
        open_ones = comparison_pb2.ListFindingsRequest(include_noise=True, window=window)

        ((why,),) = ([*difference.explanations] for difference in listed)
        assert (why.cause, why.pairs) == (comparison_pb2.EXPLANATION_CAUSE_RULE, 4)
        assert (why.rule_id, why.rule_name, why.owner, why.reason) == (*(made.id, made.name, made.owner, made.reason),)
        assert finding in {difference.id for difference in (await sidecar.comparison.ListFindings(everything)).findings}
        assert finding not in {
            difference.id for difference in (await sidecar.comparison.ListFindings(open_ones)).findings
        }
    pairs = await sidecar.comparison.ListPairs(comparison_pb2.ListPairsRequest(finding_id=finding))
    assert len(pairs.pairs) == 4
    _, shown, _ = await abreast(sidecar, "findings", "--explained")
    assert re.search(rf"\b{finding}  rule +4 .*{re.escape(made.reason)}", shown)
    page = (await sidecar.http.get("/")).text
    assert page.index("Explained") < page.index(f"rule {made.id} (")


FILE = """
rules:
  - {name: ids, action: ignore, path: $.id, owner: me, reason: random, expires: 2099-01-31}
  - {name: cents, action: tolerate, path: $.price, relative: 1%, owner: me, reason: rounding, expires: 2099-01-31}
"""


LOG = re.compile(r"^\d{4}-\d\d-\d\d \d.*\n", re.MULTILINE)  # logs of the sidecar, which runs in this process


async def abreast(sidecar: Running, *words: str, cwd: Path | None = None) -> tuple[int, str, str]:
    with contextlib.chdir(cwd or Path.cwd()):
        done = await asyncio.to_thread(CliRunner().invoke, command, [*words, "--address", f"127.0.0.1:{sidecar.port}"])
    return int(done.exit_code), LOG.sub("", done.stdout), done.stderr


DOC = Path(__file__).parents[2] / "docs/rules.md"


async def test_rule_examples_in_docs_are_exact(sidecar: Running, tmp_path: Path) -> None:
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
            said = (await process.communicate())[0].decode()
        else:
            said = (await abreast(sidecar, *words, cwd=tmp_path))[1]
        assert said == printed


async def test_rules_commands_import_export_add_and_delete(sidecar: Running, tmp_path: Path) -> None:
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
