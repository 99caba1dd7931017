"""Requests to real services, whose clients should notice no proxy."""

from __future__ import annotations

from support_transparency import Case, Table, chunks, request
from support_wire import Script, Step

# Targets whose responses depend on nothing but the request: no time, no random order.
HTTPBIN_TARGETS = {
    **{
        f"status_{status}": f"/status/{status}"
        for status in (200, 201, 204, 301, 304, 400, 401, 404, 418, 429, 500, 503)
    },
    "bytes": "/bytes/1024?seed=1",
    "stream_bytes": "/stream-bytes/65536?seed=1",
    "range": "/range/100",
    "html": "/html",
    "json": "/json",
    "xml": "/xml",
    "robots": "/robots.txt",
    "utf8": "/encoding/utf8",
    "base64": "/base64/aGVsbG8=",
    "redirect": "/redirect/2",
    "redirect_absolute": "/absolute-redirect/2",
    "redirect_to": "/redirect-to?url=https%3A%2F%2Fexample.org%2F&status_code=307",
    "cookies_set": "/cookies/set?a=1",
    "cookies": "/cookies",
    "basic_auth": "/basic-auth/user/word",
    "bearer": "/bearer",
    "drip": "/drip?duration=0.2&numbytes=5&delay=0",
    "image": "/image/png",
    "trailers": "/trailers?x-t=1",
    "user_agent": "/user-agent",
    "links": "/links/3/0",
    "deny": "/deny",
    "missing": "/no/such/page",
    "encoded": "/anything%2Fa",
}
HTTPBIN_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE", "QUERY", "PROPFIND")


def _post(headers: list[str], body: bytes = b"") -> bytes:
    return request("POST /p?a=1 HTTP/1.1", headers, body)


_ECHO_REQUESTS: dict[str, Script] = {
    "get": (request("GET /p?a=1&b= HTTP/1.1"),),
    "head": (request("HEAD / HTTP/1.1"),),
    "options": (request("OPTIONS / HTTP/1.1"),),
    "delete": (request("DELETE /p HTTP/1.1"),),
    "propfind": (request("PROPFIND /p HTTP/1.1"),),
    "query": (request("QUERY /p HTTP/1.1", ["content-length: 2"], b"ab"),),
    "own_method": (request("OWN /p HTTP/1.1"),),
    "post": (_post(["content-length: 4", "content-type: text/plain"], b"body"),),
    "post_chunked": (_post(["transfer-encoding: chunked"], chunks(b"bo", b"dy")),),
    "post_1m": (_post([f"content-length: {2**20}"], b"a" * 2**20),),
    "post_expect": (_post(["content-length: 4", "expect: 100-continue"]), Step.AWAIT_HEAD, b"body"),
    "get_body": (request(headers=["content-length: 4"], body=b"body"),),
    "repeated": (request(headers=["x-t-a: 1", "x-t-b: 2", "x-t-a: 3", "cookie: a=1", "cookie: b=2"]),),
    "latin1": (request(headers=["x-t-a: \xe4"]),),
    "encoded": (request("GET /a%2Fb/%2e%2e//c;d?e=%zz HTTP/1.1"),),
    "absolute": (request("GET http://shop/p HTTP/1.1"),),
    "absolute_https": (request("GET https://shop/p HTTP/1.1"),),
    "version_10": (request("GET / HTTP/1.0"),),
    "version_10_keep_alive": (request("GET / HTTP/1.0", ["connection: keep-alive"]),),
    "close": (request(headers=["connection: close"]),),
    "upgrade_tls": (request(headers=["connection: Upgrade", "upgrade: TLS/1.2"]),),
    "upgrade_h2c": (
        request(headers=["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQA"]),
    ),
    "headers_60": (request(headers=[f"x-t-{number}: v" for number in range(60)]),),
    "headers_93": (request(headers=[f"x-t-{number}: v" for number in range(93)]),),
    "header_6k": (request(headers=["x-t-a: " + "a" * 6000]),),
    "header_64k": (request(headers=["x-t-a: " + "a" * 65536]),),
    "target_4k": (request("GET /" + "a" * 4000 + " HTTP/1.1"),),
}


def _httpbin_cases() -> dict[str, Case]:
    table = Table()
    for name, target in HTTPBIN_TARGETS.items():
        table.add(f"httpbin_{name}", request(f"GET {target} HTTP/1.1"))
        table.add(f"httpbin_head_{name}", request(f"HEAD {target} HTTP/1.1"))
    for method in HTTPBIN_METHODS:
        table.add(f"httpbin_method_{method.lower()}", request(f"{method} /status/200 HTTP/1.1"))
    table.add("httpbin_range_part", request("GET /range/100 HTTP/1.1", ["range: bytes=10-19"]))
    table.add("httpbin_not_modified", request("GET /cache HTTP/1.1", ['if-none-match: "abc"']))
    table.add("httpbin_login", request("GET /basic-auth/user/word HTTP/1.1", ["authorization: Basic dXNlcjp3b3Jk"]))
    return table.cases


def _echo_cases() -> dict[str, Case]:
    table = Table()
    for name, script in _ECHO_REQUESTS.items():
        table.add(f"echo_{name}", *script)
    table.add("echo_two_requests", request(), Step.AWAIT_HEAD, request("GET /2 HTTP/1.1"), responses=2)
    table.add("echo_pipelined", request("GET /1 HTTP/1.1") + request("GET /2 HTTP/1.1"), responses=2)
    return table.cases


HTTPBIN_CASES = _httpbin_cases()
ECHO_CASES = _echo_cases()
