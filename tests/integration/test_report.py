"""`abreast report` on a ledger with dangerous content, and on one with several pages of findings."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, rule_pb2_grpc, traffic_pb2
from abreast_sidecar.cli import abreast
from abreast_sidecar.client.sidecar_client import MAX_PAGE_ROWS
from support_captures import capture
from support_serve import NOON, RunningSidecar, packed, run_sidecar

pytestmark = pytest.mark.postgres

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e{{ 7*7 }}"
MANY = MAX_PAGE_ROWS + 5
ROWS = """
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, first_seen, last_seen, state, reason)
select %s, 'body', '$.field' || n, 'changed', 'value', 1, %s, %s, 'real', 'counted' from generate_series(1, %s) as n
"""


class Page(HTMLParser):
    """Collects tags, attributes and text like a browser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url) as sidecar:
        yield sidecar


async def run(sidecar: RunningSidecar, output: Path, *options: str) -> Result:
    words = ["report", "--output", str(output), "--address", f"127.0.0.1:{sidecar.port}", *options]
    return await asyncio.to_thread(CliRunner().invoke, abreast, words)


async def add_hostile_content(sidecar: RunningSidecar) -> None:
    """Add add_hostile_content content to each text that comes from requests, answers or people."""
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint(route=f"/{EVIL}")
    finding = ledger.finding(endpoint, f"$[{EVIL!r}]", reason=EVIL, detail={"old": EVIL, "new": EVIL})
    ledger.finding(endpoint, f"$.noise{EVIL}", state="noise", count=3, reason=EVIL)
    difference = {
        "part": "body", "path": EVIL, "exact_path": EVIL, "kind": "changed", "impact": "value",
        "old": json.dumps(EVIL), "new": EVIL,
    }  # fmt: skip
    pair = ledger.pair(endpoint, finding, request=f"/{EVIL}", reason=EVIL)
    ledger.example(pair, {finding: 10}, packed(capture("old"), capture("new", role="shadow")), [difference])
    rule = rule_pb2.Rule(action=rule_pb2.RULE_ACTION_IGNORE, path="$.other", name=EVIL[:60], owner=EVIL, reason=EVIL)
    rule.expire_time.FromDatetime(NOON.replace(year=2099))
    rules = rule_pb2_grpc.RuleServiceStub(sidecar.channel)
    await rules.CreateRule(rule_pb2.CreateRuleRequest(rule=rule, actor="ann"))
    changed = traffic_pb2.UpdateTrafficRequest(service="shop", new_share=0.1, actor=EVIL, reason=EVIL, force=True)
    await sidecar.traffic.UpdateTraffic(changed)


async def test_report_escapes_hostile_content(sidecar: RunningSidecar, tmp_path: Path) -> None:
    await add_hostile_content(sidecar)
    result = await run(sidecar, tmp_path / "r")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "r.html").read_text()
    page = Page(text)

    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "a", "svg", "object", "form"})
    assert not {name for name in page.attributes if name.startswith("on") or name in {"src", "href", "style"}}
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "ignore path $.other" in page.text
    assert "49" not in page.text.split("Findings")[1].split("Waived")[0].replace("alert", "")
    assert "\u202e" not in text
    assert "http://" not in text
    assert "https://" not in text


async def test_report_contains_all_pages_of_large_ledger(sidecar: RunningSidecar, tmp_path: Path) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    ledger.execute(ROWS, endpoint, NOON, NOON, MANY)
    expected = ledger.finding(endpoint, "$.meant", count=2)
    ledger.pair(endpoint, expected)
    request = api.SetFindingStatusRequest(
        id=expected, status=api.FINDING_STATUS_EXPECTED, reason="announced in May", actor="ann"
    )
    await sidecar.comparison.SetFindingStatus(request)
    ledger.pair(endpoint)
    result = await run(sidecar, tmp_path / "r", "--examples", "0", "--max-mismatch", "0.5%")
    report: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    text = (tmp_path / "r.html").read_text()

    assert result.exit_code == 0, result.output
    assert (len(report["findings"]), len(report["waived"])) == (MANY, 1)
    assert report["verdict"]["state"] == "VERDICT_STATE_INCONCLUSIVE"
    assert report["verdict"]["budget"]["max_mismatch"] == 0.005
    assert text.count("<section>") == MANY
    assert re.search(r"expected</span></td>.*\bannounced in May</td>", text, re.DOTALL)
    assert "Can the new version take over? <b>Not yet. The evidence on" in text


async def test_report_to_missing_folder_fails_and_leaves_no_file(sidecar: RunningSidecar, tmp_path: Path) -> None:
    sidecar.ledger().pair(sidecar.ledger().endpoint())
    result = await run(sidecar, tmp_path / "missing" / "r")

    assert result.exit_code == 2
    assert "choose another --output" in result.output
    assert not any(tmp_path.glob("*"))  # noqa: ASYNC240  # an empty folder
