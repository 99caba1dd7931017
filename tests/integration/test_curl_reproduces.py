"""The printed curl lines of findings of each kind, run against both versions: they show the difference."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import httpx
import pytest
import pytest_asyncio

import abreast
from abreast import ParallelRunMiddleware
from abreast.recorder import Receive, Scope, Send
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.cli.findings import print_finding
from abreast_sidecar.client.output import make_console
from support import eventually_async
from support_database import LedgerDatabase
from support_middleware import marks, pair_id, serving
from support_serve import NOON, run_sidecar

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]

JSON = {"content-type": "application/json"}
VARYING_LINES = re.compile(r"(?im)^(date|server|x-abreast-\S+): .*\n")
CURL_ERRORS = re.compile(r"curl: .*")
AMOUNTS = b'{"amount": %s}'


@dataclass(frozen=True)
class Answer:
    body: bytes = b"{}"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


@dataclass(frozen=True)
class Case:
    """A request, the answers of both versions to exactly this request, and what both lines print.

    A request that lacks a header, the query or the body gets a 404 from both versions, so that its line shows nothing.
    """

    name: str
    finding: str  # part, path and kind
    old: Answer
    new: Answer
    shows: tuple[str, str]  # in the output of old, and in that of new
    method: str = "GET"
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def target(self) -> str:
        return f"/{self.name}" + (f"?{self.query}" if self.query else "")


def make_body_case(name: str, finding: str, old: bytes, new: bytes, **request: object) -> Case:
    return Case(name, finding, Answer(old), Answer(new), (old.decode(), new.decode()), **request)  # type: ignore[arg-type]  # fields of Case


CORS = {"access-control-allow-origin": "https://shop.example", "access-control-allow-methods": "PUT"}
PREFLIGHT = {
    "origin": "https://shop.example",
    "access-control-request-method": "PUT",
    "access-control-request-headers": "content-type",
}
PARTIAL = {"content-type": "text/plain", "content-range": "bytes 0-1/10"}
COMPRESSED = {**JSON, "content-encoding": "gzip"}
# fmt: off
CASES = [
    Case("order", "status 200->500 changed", Answer(), Answer(b"failed", 500), ("200 OK", "500 Internal"), "POST",
         "currency=JPY&note=it's%20%22x%22", JSON, b'{"lines": [{"name": "it\'s $HOME", "n": 2}]}'),
    Case("preflight", "header access-control-allow-origin removed", Answer(b"", 204, CORS), Answer(b"", 204, {}),
         ("access-control-allow-origin", ""), "OPTIONS", headers=PREFLIGHT),
    Case("language", "header content-language changed", Answer(headers={**JSON, "content-language": "de"}),
         Answer(headers={**JSON, "content-language": "en"}), ("content-language: de", "content-language: en"),
         headers={"accept-language": "de-DE, de;q=0.9"}),
    Case("deprecated", "header deprecation added", Answer(), Answer(headers={**JSON, "deprecation": "true"}),
         ("", "deprecation: true"), "DELETE"),
    Case("range", "status 206->200 changed", Answer(b"ab", 206, PARTIAL), Answer(b"abcdefghij", 200),
         ("206 Partial", "200 OK"), headers={"range": "bytes=0-1"}),
    Case("compressed", "header content-encoding removed", Answer(gzip.compress(b'{"a": 1}'), headers=COMPRESSED),
         Answer(b'{"a": 1}'), ("content-encoding: gzip", ""), headers={"accept-encoding": "gzip"}),
    Case("redirect", "header location changed", Answer(b"", 302, {"location": "https://shop.example/cart"}),
         Answer(b"", 302, {"location": "http://shop.example/cart"}), ("https://shop.example", "http://shop.example"),
         headers={"host": "shop.example", "x-forwarded-proto": "https"}),
    make_body_case("added", "body $.b added", b'{"a": 1}', b'{"a": 1, "b": 2}', headers={"prefer": "return=minimal"}),
    make_body_case("removed", "body $.b removed", b'{"a": 1, "b": 2}', b'{"a": 1}', query="fields=a,b&x[]=1"),
    make_body_case("changed", "body $.amount changed", AMOUNTS % b"11", AMOUNTS % b"10", method="PATCH",
                   headers={"content-type": "application/merge-patch+json"}, body=b'{\n  "city": "Z\xc3\xbcrich"\n}'),
    make_body_case("type", "body $.amount type", AMOUNTS % b"1.5", AMOUNTS % b'"1.5"',
                   headers={"accept": "application/json;version=2"}),
    make_body_case("format", "body $.at format", b'{"at": "2026-03-04T12:00:00Z"}', b'{"at": "2026-03-04T13:00:00+01:00"}',
                   method="PUT", headers=JSON, body=b"[1]"),
    make_body_case("outlier", "body $.amount range", AMOUNTS % b"5", AMOUNTS % b"-500000"),
    make_body_case("sorted", "body $.tags order", b'{"tags": ["a", "b", "c"]}', b'{"tags": ["c", "a", "b"]}',
                   headers={"x-requested-with": "XMLHttpRequest", "origin": "https://shop.example"}),
]
# fmt: on
CASES_BY_NAME = {case.name: case for case in CASES}


def make_app(version: str, redis_url: str) -> ParallelRunMiddleware:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        name = scope["path"].strip("/")
        answer = select_answer(version, name, headers, body)
        if (case := CASES_BY_NAME.get(name)) and is_request_of(case, scope, headers, body):
            answer = getattr(case, version)
        rows = [(key.encode(), value.encode()) for key, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": rows})
        await send({"type": "http.response.body", "body": answer.body})

    return ParallelRunMiddleware(app, service="shop", redis_url=redis_url, pair_timeout=1.0)


def select_answer(version: str, name: str, headers: Mapping[str, str], body: bytes) -> Answer:
    is_old = version == "old"
    match name:
        case "raised":
            raise (KeyError if is_old else ValueError)("secret")
        case "effect":
            abreast.record("email.send", {"to": "ann" if is_old else "bob"})
            return Answer()
        case "unfinished":
            return Answer(b"complete!" if is_old else b"comp", headers={"content-length": "9"})
        case "hidden" | "secret" | "long":
            is_changed = "x-tenant" in headers or "authorization" in headers or len(body) > 5000
            return Answer(AMOUNTS % (b"2" if is_changed and not is_old else b"1"))
    return Answer(b"no such request", 404)


def is_request_of(case: Case, scope: Scope, headers: Mapping[str, str], body: bytes) -> bool:
    return (
        (scope["method"], scope["query_string"].decode(), body) == (case.method, case.query, case.body)
        and case.headers.items() <= headers.items()
        and (case.name != "deprecated" or "accept" not in headers)
    )


@dataclass
class Findings:
    """The addresses of both versions, and the text of each finding, by case."""

    old: str
    new: str
    texts: dict[str, list[str]]

    async def run(self, line: str) -> tuple[str, str]:
        outputs = []
        for url in (self.old, self.new):
            process = await asyncio.create_subprocess_exec(
                *("bash", "-c", line),
                env={**os.environ, "URL": url, "no_proxy": "*"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            output, errors = await asyncio.wait_for(process.communicate(), 20)
            text = output.decode("latin-1").replace("\r\n", "\n") + "".join(CURL_ERRORS.findall(errors.decode()))
            outputs.append(VARYING_LINES.sub("", text[text.find("HTTP/1.1") :]))
        return outputs[0], outputs[1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def findings(redis_server: object, module_database: LedgerDatabase) -> AsyncIterator[Findings]:
    redis_url = redis_server.url  # type: ignore[attr-defined]  # RedisServer
    async with (
        run_sidecar(redis_url, module_database.url) as sidecar,
        serving(make_app("old", redis_url)) as (old, _),
        serving(make_app("new", redis_url)) as (new, _),
        httpx.AsyncClient() as client,
    ):
        requests = [(case.method, case.target, dict(case.headers), case.body) for case in CASES]
        requests += [("GET", f"/{name}", {}, b"") for name in ("unfinished", "raised", "effect")]
        requests += [("GET", "/hidden", {"x-tenant": "north"}, b"")]
        requests += [("GET", "/secret", {"authorization": "Bearer s3cret"}, b"")]
        requests += [("POST", "/long", JSON, b'"' + b"x" * 5000 + b'"')]
        for method, target, headers, body in requests:
            pair = pair_id()
            for url, version, role in ((old, "old", "live"), (new, "new", "shadow")):
                request = client.build_request(method, url + target, content=body or None)
                if "accept-encoding" not in headers:
                    del request.headers["accept-encoding"]
                if target == "/deprecated":
                    del request.headers["accept"]
                request.headers.update({**headers, **marks(pair, version=version, role=role)})
                try:
                    await client.send(request)
                except httpx.RemoteProtocolError:
                    assert target == "/unfinished"

        paths = {target.partition("?")[0] for _, target, _, _ in requests}

        async def has_all() -> bool:
            listed = await sidecar.comparison.ListFindings(
                pb.ListFindingsRequest(page_size=100, include_noise=True, include_settled=True)
            )
            return {finding.endpoint.route for finding in listed.findings} == paths

        await eventually_async(has_all, description="each request has a finding")
        listed = await sidecar.comparison.ListFindings(
            pb.ListFindingsRequest(service="shop", page_size=100, include_noise=True, include_settled=True)
        )
        texts: dict[str, list[str]] = {}
        for finding in listed.findings:
            response = await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=finding.id))
            console = make_console(120)
            with console.capture() as capture:
                print_finding(console, response, NOON)
            texts.setdefault(finding.endpoint.route.strip("/"), []).append(capture.get())
        yield Findings(old, new, texts)


def get_line(text: str) -> str:
    [line] = [line.strip() for line in text.splitlines() if line.startswith("  curl ")]
    return line


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_curl_line_shows_difference(findings: Findings, case: Case) -> None:
    part, path, kind = case.finding.split()
    place = path if part == "body" else f"{part} {path}"
    [text] = [text for text in findings.texts[case.name] if place.split("->")[0] in text and kind in text]
    old, new = await findings.run(get_line(text))

    assert "without" not in text
    assert "404" not in old + new
    assert old != new
    assert case.shows[0] in old
    assert case.shows[1] in new
    assert not case.shows[0] or case.shows[0] not in new
    assert not case.shows[1] or case.shows[1] not in old


async def test_curl_line_shows_broken_response(findings: Findings) -> None:
    old, new = await findings.run(get_line(findings.texts["unfinished"][0]))

    assert ("complete!" in old, "curl: (18)" in new) == (True, True)


@pytest.mark.parametrize("name", ["raised", "effect"])
async def test_finding_says_that_no_response_shows_it(findings: Findings, name: str) -> None:
    [text] = findings.texts[name]
    old, new = await findings.run(get_line(text))

    assert old == new
    assert "no response shows this difference" in text


@pytest.mark.parametrize(
    ("name", "omission"),
    [
        ("hidden", "without its x-tenant (not captured: setting request_headers of the service)"),
        ("secret", "without its authorization (a secret; only its hash is stored)"),
        ("long", "without its body (5002 bytes; see --json)"),
    ],
)
async def test_curl_line_that_shows_nothing_says_what_it_lacks(findings: Findings, name: str, omission: str) -> None:
    [text] = findings.texts[name]
    old, new = await findings.run(get_line(text))

    assert old == new
    assert omission in text
