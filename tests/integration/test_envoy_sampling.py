"""Rules that choose which requests Envoy samples, on a real Envoy."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from abreast_sidecar.envoy.sampling import parse_rules
from support import eventually_async
from support_envoy import Abreast, abreast, weights
from support_upstream import Received, Upstream, _body, ok

SECRET = "0123456789abcdef"
NEVER, ALWAYS = 0, 1_000_000
INTROSPECTED = (
    'query Products($ids: [ID!] = [], $filter: F = {text: "mutation { a }"}) @x(a: {b: 1}) { a(ids: $ids) { b } }'
)


def fraction(numerator: int) -> dict[str, Any]:
    return {"numerator": numerator, "denominator": "MILLION"}


async def ask_and_list_copies(
    proxy: Abreast, *requests: tuple[str, str] | tuple[str, str, dict[str, str]]
) -> list[str]:
    """Send requests, and return those that new got a copy of."""
    proxy.new.received.clear()
    for method, path, *headers in requests:
        answer = await proxy.client.request(method, path, headers=dict(*headers))
        assert answer.status_code == 200
    await proxy.settled()
    return [f"{request.method} {request.path}" for request in proxy.new.in_role("shadow")]


async def test_first_rule_that_matches_decides() -> None:
    rules = (
        "POST /search 100%; /admin/open 100%; /admin/* 0%; GET /users/{id} host:*.example.com 0%; GET /users/{id}/* 0%;"
        " * header:x-canary=1 0%; PUT,GET header:x-put 100%"
    )
    async with abreast(sample=parse_rules(rules), sample_safe=1.0) as proxy:
        assert await ask_and_list_copies(
            proxy,
            ("POST", "/search?q=1"),
            ("GET", "/search"),  # no rule: the share of safe requests
            ("POST", "/search/more"),
            ("GET", "/admin/open"),
            ("POST", "/admin/open"),  # the rule names no method
            ("GET", "/admin/users?x=/admin/open"),
            ("GET", "/admin"),
            ("GET", "/users/7", {"host": "Shop.Example.com:8080"}),
            ("GET", "/users/7", {"host": "example.com"}),
            ("GET", "/users/7/orders"),
            ("GET", "/users/7/"),
            ("GET", "/", {"x-canary": "1"}),
            ("GET", "/", {"x-canary": "2"}),
            ("PUT", "/put"),
            ("PUT", "/put", {"x-put": ""}),
            ("PUT", "/put", {"x-put": "1", "x-canary": "1"}),
        ) == ["POST /search?q=1", "GET /search", "GET /admin/open", "GET /admin", "GET /users/7", "GET /", "PUT /put"]
        assert await proxy.stat("http.ingress.lua.copies.rule.post-search.sampled") == 1
        assert await proxy.stat("http.ingress.lua.copies.rule.admin-open.sampled") == 1
        assert await proxy.stat("http.ingress.lua.copies.rule.admin.sampled") == 0


async def test_rules_hold_for_testers_too() -> None:
    async with abreast(sample=parse_rules("/admin/* 0%; POST /search 100%"), tester_secret=SECRET) as proxy:
        headers = {"x-abreast-use": f"old {SECRET}"}
        copies = await ask_and_list_copies(
            proxy, ("GET", "/admin/x", headers), ("POST", "/search", headers), ("POST", "/other", headers)
        )

        assert copies == ["POST /search"]


async def test_share_of_rule_changes_at_run_time() -> None:
    async with abreast(sample=parse_rules("POST /search 0%; /admin/* 100%")) as proxy:
        requests = [("POST", "/search"), ("GET", "/admin/x")]
        assert await ask_and_list_copies(proxy, *requests) == ["GET /admin/x"]
        layer = {"abreast.rule.post-search.sampled": fraction(ALWAYS), "abreast.rule.admin.sampled": fraction(NEVER)}
        await proxy.sidecar.set(weights(0.0) | layer)

        assert await ask_and_list_copies(proxy, *requests) == ["POST /search"]


async def test_read_only_rule_gets_baseline_copies() -> None:
    rules = parse_rules("POST /search read-only 100%; POST /orders 100%")
    async with abreast(sample=rules, baseline_share=1.0) as proxy:
        await ask_and_list_copies(proxy, ("POST", "/search"), ("POST", "/orders"))

        assert [request.path for request in proxy.old.in_role("baseline")] == ["/search"]


async def ask_graphql(proxy: Abreast, body: bytes, path: str = "/graphql", **headers: str) -> bool:
    """Send a request, and return True if new got a copy."""
    proxy.old.received.clear()
    proxy.new.received.clear()
    answer = await proxy.client.post(path, content=body, headers={"content-type": "application/json", **headers})
    await proxy.settled()
    assert answer.status_code == 200
    assert [request.body for request in proxy.old.in_role("live")] == [body]
    copies = [request.body for request in proxy.new.in_role("shadow")]
    assert copies in ([], [body])
    return bool(copies)


def document(text: Any, **members: Any) -> bytes:
    return json.dumps({"query": text, **members}).encode()


async def test_graphql_rule_takes_only_queries() -> None:
    queries = [
        document("{ products { id } }"),
        document("query { products { id } }"),
        document(INTROSPECTED, operationName="Products", variables={"ids": [1, -2.5e3, None, "}"]}, extensions={}),
        document("# mutation\n\nquery A { a } , query B { b }", operationName="B"),
        document("fragment F on Product { id } query { products { ...F } }"),
        document('{ a(text: "mutation { b }", block: """ } \\""" mutation """) }'),
        document('{ search(text: "Bücher \\" }") { mutation subscription } }'),
        json.dumps({"query": "{ ü: a }"}, ensure_ascii=False).replace("ü", "u").encode(),
        b' { "query" : "\\u007b a }" } \n',
    ]
    others = [
        document("mutation { buy }"),
        document("mutation Buy { buy }", operationName="Buy"),
        document("subscription { prices }"),
        document("query A { a } mutation B { b }"),
        document("query A { a } mutation B { b }", operationName="A"),
        document("{ a } mutation { b }"),
        document("fragment F on Product { id }"),
        document("fragment F on Product { id } mutation { a { ...F } }"),
        document("  , # query\n mutation { buy }"),
        document("queryX { a }"),
        document("query A mutation { b }"),
        document('"""text""" query { a }'),
        document("{ a } }"),
        document("{ a"),
        document("query ($a: Int = 1) "),
        document('{ a(b: "\n") }'),
        document("type A { b: Int }"),
        document("é { a }"),
        document(""),
        document(None),
        document(["{ a }"]),
        document("{ a }", id="stored"),
        document("{ a }", Query="mutation { b }"),
        json.dumps([{"query": "{ a }"}]).encode(),
        b'{"query": "{ a }", "query": "mutation { b }"}',
        b'{"query": "{ a }", "\\u0071uery": "mutation { b }"}',
        b'{"query": "{ a }"} {"query": "mutation { b }"}',
        b'{"query": "{ a }", "variables": {"a": }}',
        b'{"query": "{ a }",}',
        b'{"query": "{ a }"',
        b'{"variables": ' + b"[" * 200 + b"]" * 200 + b', "query": "{ a }"}',
        b'{"operationName": "Stored", "variables": {}, "extensions": {"persistedQuery": {"sha256Hash": "0"}}}',
        b"query=%7Ba%7D",
        b"{ a }",
        b"",
        document("{ a }", variables={"text": "x" * 16_384}),
    ]
    async with abreast(sample=parse_rules("POST /graphql queries 100%"), sample_safe=0.0) as proxy:
        assert [body for body in queries if not await ask_graphql(proxy, body)] == []
        assert [body for body in others if await ask_graphql(proxy, body)] == []
        query = document("{ a }")
        assert await ask_graphql(proxy, query, **{"content-type": "application/json; charset=UTF-8"})
        assert not await ask_graphql(proxy, query, **{"content-type": "application/json; charset=utf-16"})
        assert not await ask_graphql(proxy, query, **{"content-type": "text/plain"})
        assert not await ask_graphql(proxy, query, **{"content-encoding": "identity"})
        assert not await ask_graphql(proxy, query, "/graphql?query=mutation{a}")
        assert not await ask_graphql(proxy, query, "/other")
        prefix = "http.ingress.lua.copies.rule.post-graphql"
        assert await proxy.stat(f"{prefix}.sampled") == len(queries) + len(others) + 5
        assert await proxy.stat(f"{prefix}.not_query") == len(others) + 4


@dataclass
class EarlyUpstream(Upstream):
    """Records the heads of requests before their bodies arrive."""

    heads: list[bytes] = field(default_factory=list)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
        self.heads.append(head)
        self.received.append(Received(head, *await _body(head, reader)))
        await ok(self.received[-1], writer)


async def test_graphql_rule_does_not_delay_the_live_request() -> None:
    old = EarlyUpstream()
    async with abreast(sample=parse_rules("POST /graphql queries 100%"), old=old) as proxy:
        head = b"POST /graphql HTTP/1.1\r\nhost: shop\r\ncontent-type: application/json\r\ntransfer-encoding: chunked"
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(head + b"\r\n\r\n" + b'a\r\n{"query": \r\n')

        async def has_head() -> bool:
            return any(b"/graphql" in head for head in old.heads)

        await eventually_async(has_head, description="old got the head of the request")
        assert not old.received
        writer.write(b'8\r\n"{ a }"}\r\n0\r\n\r\n')
        assert b"200" in await reader.readline()
        writer.close()
        await proxy.wait_for_requests(proxy.new, 1)

        assert [request.body for request in proxy.new.in_role("shadow")] == [b'{"query": "{ a }"}']
