"""Raw requests and responses that should pass a proxy unchanged, and the comparison of what both sides received."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from support_wire import OK, Exchange, Message, Recorder, Script, Step, exchange

HELD = (Step.READ, OK)
OUR_REQUEST_HEADERS = frozenset(
    {
        *(b"x-forwarded-for", b"x-forwarded-proto", b"x-request-id", b"x-envoy-attempt-count"),
        *(b"x-abreast-version", b"x-abreast-role", b"x-abreast-pair", b"x-abreast-copies"),
    }
)
BARE_REQUEST_HEADERS = frozenset(
    {b"x-forwarded-for", b"x-forwarded-proto", b"x-request-id", b"x-envoy-expected-rq-timeout-ms"}
)
COPY_MARKS = frozenset({b"x-abreast-version", b"x-abreast-role", b"x-abreast-copies"})
# A proxy has separate connections, so it may state how they end.
HOP_HEADERS = frozenset({b"connection", b"keep-alive"})
# They mean nothing to a client whose connection ends in the same way.
HOP_DIFFERENCES = {
    f"client: header {name} {change}"
    for name in ("connection", "keep-alive")
    for change in ("added", "changed", "removed")
}
OUR_RESPONSE_HEADERS = HOP_HEADERS | {b"x-abreast-version", b"date"}
BARE_RESPONSE_HEADERS = HOP_HEADERS | {b"server", b"date", b"x-envoy-upstream-service-time"}
NGINX_RESPONSE_HEADERS = HOP_HEADERS | {b"server", b"date"}


@dataclass(frozen=True)
class Case:
    """`client` is the script of the client and `service` of the service. A slow case runs only in a full run."""

    name: str
    client: Script
    service: Script = HELD
    responses: int = 1
    timeout: float = 30.0
    is_slow: bool = False
    has_exact_names: bool = False  # compare the case of header names in the response

    @property
    def key(self) -> bytes:
        return self.name.encode()


@dataclass
class Table:
    """Collects cases with unique names."""

    cases: dict[str, Case] = field(default_factory=dict)

    def add(self, name: str, *steps: bytes | float | Step, service: Script = HELD, **options: object) -> None:
        """Add a case. In `steps`, `@` in the header `x-case: @` stands for its name."""
        if name in self.cases:
            raise ValueError(f"case {name} exists twice")
        client = tuple(
            step.replace(b"x-case: @", b"x-case: " + name.encode()) if isinstance(step, bytes) else step
            for step in steps
        )
        self.cases[name] = Case(name, client, tuple(service), **options)  # type: ignore[arg-type]


def request(
    line: str | bytes = "GET / HTTP/1.1", headers: Iterable[str | bytes] = (), body: bytes = b"", host: str = "shop"
) -> bytes:
    lines = [line, f"host: {host}", "x-case: @", *headers]
    return (
        b"\r\n".join(part if isinstance(part, bytes) else part.encode("latin-1") for part in lines) + b"\r\n\r\n" + body
    )


def response(
    status: str | bytes = "200 OK",
    headers: Iterable[str | bytes] = (),
    body: bytes | None = b"ok",
    version: bytes = b"HTTP/1.1",
) -> bytes:
    """Return a response. Its length is stated if `body` is not None."""
    line = version + b" " + (status if isinstance(status, bytes) else status.encode("latin-1"))
    length = [] if body is None else [f"content-length: {len(body)}"]
    lines = [line, *(part if isinstance(part, bytes) else part.encode("latin-1") for part in (*length, *headers))]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def answering(*args: object, **options: object) -> Script:
    return (Step.READ, response(*args, **options))  # type: ignore[arg-type]


def chunks(*parts: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailers + b"\r\n"


STANDARD_METHODS = """
ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT COPY DELETE GET HEAD LABEL LINK LOCK MERGE MKACTIVITY MKCALENDAR MKCOL
MKREDIRECTREF MKWORKSPACE MOVE OPTIONS ORDERPATCH PATCH POST PROPFIND PROPPATCH PUT QUERY REBIND REPORT SEARCH TRACE
UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE UPDATEREDIRECTREF VERSION-CONTROL
"""
OTHER_METHODS = "PURGE BAN M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE SOURCE X-OWN get Post A_B+C.D~E CONNECT"
METHODS = (*STANDARD_METHODS.split(), *OTHER_METHODS.split(), "LONG" * 20)

TARGETS = {
    "absolute_http": "http://shop/p",
    "absolute_https": "https://shop/p",
    "absolute_port": "http://shop:80/p",
    "absolute_query": "http://shop/p?a=1&b=2",
    "absolute_other_host": "http://other.example/p",
    "absolute_no_path": "http://shop",
    "absolute_upper_scheme": "HTTP://shop/p",
    "absolute_user": "http://user:word@shop/p",
    "encoded_slash": "/a%2Fb",
    "encoded_slash_lower": "/a%2fb",
    "encoded_backslash": "/a%5Cb",
    "encoded_dot": "/a/%2e%2e/b",
    "encoded_percent": "/a%25b",
    "encoded_null": "/a%00b",
    "encoded_newline": "/a%0d%0ab",
    "encoded_space": "/a%20b",
    "encoded_utf8": "/%C3%A4%E2%82%AC",
    "encoded_latin1": "/%E4",
    "encoded_letters": "/%41%62",
    "encoded_mixed_case": "/%c3%A4",
    "encoded_broken": "/a%zz",
    "encoded_cut": "/a%2",
    "encoded_twice": "/a%252Fb",
    "dot": "/a/./b",
    "dot_dot": "/a/../b",
    "dot_dot_above_root": "/../../b",
    "dot_end": "/a/..",
    "dots_three": "/a/.../b",
    "double_slash": "/a//b",
    "double_slash_start": "//a/b",
    "double_slash_end": "/a//",
    "triple_slash": "///",
    "backslash": "/a\\b",
    "semicolon": "/a;v=1/b;w",
    "colon": "/a:b",
    "at": "/@user",
    "tilde": "/~user",
    "comma": "/a,b",
    "quote": '/a"b',
    "single_quote": "/a'b",
    "angle": "/<a>",
    "braces": "/{a}",
    "pipe": "/a|b",
    "caret": "/a^b",
    "backtick": "/a`b",
    "brackets": "/a[0]",
    "parentheses": "/a(b)",
    "plus": "/a+b",
    "star": "/*",
    "dollar": "/$a",
    "non_ascii_utf8": "/\xc3\xa4",
    "non_ascii_latin1": "/\xe4",
    "query_non_ascii": "/?q=\xc3\xa4",
    "query_empty": "/?",
    "query_only_and": "/?&&",
    "query_equals": "/?=",
    "query_repeated": "/?a=1&a=2&a=",
    "query_question": "/?a?b=c?",
    "query_slash": "/?a=/b//../c",
    "query_encoded": "/?a=%26%3D%2B+%20",
    "query_brackets": "/?a[]=1&a[k]=2",
    "query_url": "/?u=http://a.b/c?d=e",
    "query_semicolon": "/?a=1;b=2",
    "query_broken_escape": "/?a=%zz%",
    "fragment": "/a#b",
    "fragment_query": "/a?b=1#c",
    "long_2k": "/" + "a" * 2000,
    "long_8k": "/" + "a" * 8000,
    "long_16k": "/" + "a" * 16000,
    "long_60k": "/" + "a" * 60000,
    "long_query_8k": "/?q=" + "a" * 8000,
    "many_segments": "/a" * 500,
    "many_parameters": "/?" + "&".join(f"k{number}={number}" for number in range(500)),
}


def add_requests(table: Table) -> None:
    for number, method in enumerate(METHODS):
        target = "shop:443" if method == "CONNECT" else "/"
        name = method.lower() if method.isupper() else f"as_is_{method}"
        name = f"long_{number}" if len(method) > 30 else name
        table.add(f"method_{name}", request(f"{method} {target} HTTP/1.1"))
    query = ["content-type: text/plain", "content-length: 2"]
    table.add("method_query_with_type", request("QUERY / HTTP/1.1", query, b"ab"))
    for name, target in TARGETS.items():
        table.add(f"target_{name}", request(f"GET {target} HTTP/1.1"))
    table.add("target_options_star", request("OPTIONS * HTTP/1.1"))
    table.add("target_absolute_head", request("HEAD https://shop/p HTTP/1.1"))
    table.add("target_absolute_post", request("POST https://shop/p HTTP/1.1", ["content-length: 2"], b"ab"))
    table.add("target_no_slash", request("GET p HTTP/1.1"))
    table.add("target_tab", request("GET /a\tb HTTP/1.1"))
    table.add("target_space", request("GET /a b HTTP/1.1"))
    table.add("target_two_spaces", request("GET  / HTTP/1.1"))


def add_request_headers(table: Table) -> None:
    for count in (10, 50, 90, 93, 98, 99, 100, 110, 130, 150):
        table.add(f"header_count_{count}", request(headers=[f"x-h{number}: v" for number in range(count)]))
    table.add("header_count_same_150", request(headers=["x-h: v"] * 150))
    for kilobytes in (1, 4, 8, 16, 32, 59, 64, 96, 150, 200):
        table.add(f"header_size_{kilobytes}k", request(headers=["x-big: " + "a" * kilobytes * 1024]))
    for kilobytes in (32, 96, 200):
        headers = [f"x-h{number}: " + "a" * 2048 for number in range(kilobytes // 2)]
        table.add(f"header_size_many_{kilobytes}k", request(headers=headers))
    table.add("header_size_cookie_16k", request(headers=["cookie: a=" + "b" * 16384]))
    table.add("header_size_name_1k", request(headers=["x-" + "n" * 1024 + ": v"]))
    for name, headers in {
        "custom": ["x-a: 1", "x-b: 2", "x-a: 3"],
        "accept": ["accept: text/html", "accept: */*;q=0.1"],
        "cookie": ["cookie: a=1", "cookie: b=2"],
        "forwarded": ["forwarded: for=1.2.3.4", "forwarded: for=5.6.7.8;proto=https"],
        "via": ["via: 1.1 a", "via: 1.0 b"],
        "cache_control": ["cache-control: no-cache", "cache-control: max-age=0"],
        "accept_encoding": ["accept-encoding: gzip", "accept-encoding: br"],
        "accept_language": ["accept-language: de", "accept-language: en;q=0.5"],
        "if_none_match": ['if-none-match: "a"', 'if-none-match: "b"'],
        "authorization": ["authorization: Basic YTpi", "authorization: Bearer x"],
        "content_type": ["content-type: text/plain", "content-type: text/html"],
        "user_agent": ["user-agent: a", "user-agent: b"],
        "referer": ["referer: http://a/", "referer: http://b/"],
        "range": ["range: bytes=0-1", "range: bytes=2-3"],
        "date": ["x-date: a", "x-date: b", "x-date: c"],
        "mixed_case": ["X-Mixed: 1", "x-mixed: 2", "X-MIXED: 3"],
        "empty": ["x-a:", "x-a: v", "x-a:"],
        "origin": ["origin: http://a", "origin: http://b"],
    }.items():
        table.add(f"repeated_{name}", request(headers=headers))
    table.add("repeated_host", request(headers=["host: other"]))
    for name, header in {
        "empty_value": "x-a:",
        "no_space": "x-a:v",
        "spaces_around": "x-a:   v   ",
        "tab_inside": "x-a: a\tb",
        "spaces_inside": "x-a: a  b   c",
        "latin1": "x-a: \xe4\xf6",
        "utf8": "x-a: \xc3\xa4\xe2\x82\xac",
        "quoted": 'x-a: "a\\"b, c"',
        "comma": "x-a: a, b,c ,d",
        "colon": "x-a: a:b:c",
        "underscore": "x_under_score: v",
        "dot": "x.dotted: v",
        "symbols": "x-!#$%&'*+^`|~: v",
        "digits": "123: v",
        "upper": "X-UPPER: V",
        "percent": "x-a: %41%zz",
        "obs_text": "x-a: \x80\xff",
        "control": "x-a: a\x01b",
        "delete_character": "x-a: a\x7fb",
        "folded": "x-a: a\r\n b",
        "space_before_colon": "x-a : v",
        "no_name": ": v",
        "no_colon": "x-a",
        "authorization_basic": "authorization: Basic YTpi",
        "accept_encoding_gzip": "accept-encoding: gzip, deflate, br",
        "server": "server: mine",
        "date": "date: Mon, 01 Jan 2024 00:00:00 GMT",
        "traceparent": "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "request_id": "x-request-id: mine-1",
        "request_id_uuid": "x-request-id: 7b0c6e2e-58a2-4a5c-9d3c-0f9d5b8a9a01",
        "correlation_id": "x-correlation-id: 1",
        "method_override": "x-http-method-override: DELETE",
        "original_url": "x-original-url: /admin",
        "rewrite_url": "x-rewrite-url: /admin",
        "envoy_original_path": "x-envoy-original-path: /a",
        "envoy_retry_on": "x-envoy-retry-on: 5xx",
        "envoy_timeout": "x-envoy-upstream-rq-timeout-ms: 10",
        "envoy_max_retries": "x-envoy-max-retries: 3",
        "envoy_force_trace": "x-envoy-force-trace: 1",
        "client_trace_id": "x-client-trace-id: 1",
        "max_forwards": "max-forwards: 0",
        "pragma": "pragma: no-cache",
        "early_data": "early-data: 1",
        "grpc_timeout": "grpc-timeout: 10m",
        "http2_settings": "http2-settings: AAMAAABkAARAAAAAAAIAAAAA",
        "priority": "priority: u=1, i",
        "sec_fetch": "sec-fetch-mode: navigate",
        "sendfile": "x-sendfile-type: X-Accel-Redirect",
        "client_cert": "x-forwarded-client-cert: By=a;Hash=b",
        "abreast_forged": "x-abreast-role: shadow",
        "proxy": "proxy: http://a",
        "proxy_authorization": "proxy-authorization: Basic YTpi",
    }.items():
        table.add(f"header_{name}", request(headers=[header]))
    table.add("host_missing", b"GET / HTTP/1.1\r\nx-case: @\r\n\r\n")
    table.add("host_empty", b"GET / HTTP/1.1\r\nhost:\r\nx-case: @\r\n\r\n")
    for name, host in {
        "port": "shop:8080",
        "upper": "Shop.Example",
        "ipv4": "127.0.0.1",
        "ipv6": "[::1]:8080",
        "dot": "shop.",
        "underscore": "my_shop",
        "long": "a" * 60 + ".example",
        "default_port": "shop:80",
        "user": "user@shop",
        "non_ascii": "sh\xf6p",
        "slash": "shop/x",
    }.items():
        table.add(f"host_{name}", request(host=host))


def add_connection(table: Table) -> None:
    for name, headers in {
        "connection_close": ["connection: close"],
        "connection_keep_alive": ["connection: keep-alive"],
        "connection_named": ["connection: x-hop", "x-hop: 1"],
        "connection_empty": ["connection:"],
        "connection_te": ["connection: TE", "te: trailers"],
        "connection_upper": ["Connection: Keep-Alive"],
        "connection_two": ["connection: keep-alive, x-hop", "x-hop: 1"],
        "keep_alive_header": ["keep-alive: timeout=5"],
        "proxy_connection": ["proxy-connection: keep-alive"],
        "te_trailers": ["te: trailers"],
        "te_gzip": ["te: gzip, trailers"],
        "trailer_announced": ["trailer: x-t"],
        "upgrade_tls": ["connection: Upgrade", "upgrade: TLS/1.2"],
        "upgrade_tls_13": ["connection: Upgrade", "upgrade: TLS/1.2, TLS/1.3"],
        "upgrade_h2c": ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQA"],
        "upgrade_unknown": ["connection: Upgrade", "upgrade: own/2"],
        "upgrade_without_connection": ["upgrade: own/2"],
        "upgrade_web": ["connection: upgrade", "upgrade: web"],
        "upgrade_websocket_like": ["connection: upgrade", "upgrade: websockets"],
        "expect_unknown": ["expect: own"],
    }.items():
        table.add(name, request(headers=headers))
    handshake = [
        "connection: Upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    switched = (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    table.add("websocket_accepted", request("GET /ws HTTP/1.1", handshake), service=(Step.READ, switched, 0.4))
    table.add("websocket_refused_400", request("GET /ws HTTP/1.1", handshake), service=answering("400 No", body=b""))
    table.add("websocket_refused_body", request("GET /ws HTTP/1.1", handshake), service=answering("403 No", body=b"no"))
    table.add("websocket_ignored_empty", request("GET /ws HTTP/1.1", handshake), service=answering(body=b""))
    table.add("websocket_ignored_body", request("GET /ws HTTP/1.1", handshake))
    table.add(
        "websocket_ignored_chunked",
        request("GET /ws HTTP/1.1", handshake),
        service=(Step.READ, response(headers=["transfer-encoding: chunked"], body=None) + chunks(b"ok")),
    )
    body, length = b"0123456789", "content-length: 10"
    for scheme in ("NTLM", "Negotiate"):
        table.add(f"login_{scheme.lower()}", request(headers=[f"authorization: {scheme} TlRMTVNTUAAB"]))
    expecting = request("POST / HTTP/1.1", [length, "expect: 100-continue"])
    table.add(
        "expect_100_sent", expecting, Step.AWAIT_HEAD, body, service=(b"HTTP/1.1 100 Continue\r\n\r\n", Step.READ, OK)
    )
    table.add("expect_100_refused_417", expecting, service=(response("417 Expectation Failed"), Step.CLOSE))
    table.add(
        "expect_100_refused_413", expecting, service=(response("413 Too Large", ["connection: close"]), Step.CLOSE)
    )
    table.add("expect_100_refused_401", expecting, service=(response("401 No", ["connection: close"]), Step.CLOSE))
    table.add("expect_100_body_at_once", expecting + body)
    table.add("expect_100_body_after_a_pause", expecting, 0.2, body)
    chunked = request("PUT / HTTP/1.1", ["transfer-encoding: chunked", "expect: 100-continue"])
    table.add(
        "expect_100_chunked",
        chunked,
        Step.AWAIT_HEAD,
        chunks(body),
        service=(b"HTTP/1.1 100 Continue\r\n\r\n", Step.READ, OK),
    )
    table.add("expect_100_without_body", request(headers=["expect: 100-continue"]))
    table.add(
        "expect_100_upper",
        request("POST / HTTP/1.1", [length, "Expect: 100-Continue"]),
        Step.AWAIT_HEAD,
        body,
        service=(b"HTTP/1.1 100 Continue\r\n\r\n", Step.READ, OK),
    )
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
    for name, interim in {
        "100_unasked": b"HTTP/1.1 100 Continue\r\n\r\n",
        "102": b"HTTP/1.1 102 Processing\r\n\r\n",
        "102_twice": b"HTTP/1.1 102 Processing\r\n\r\n" * 2,
        "103": hints,
        "103_twice": hints * 2,
        "104": b"HTTP/1.1 104 Upload Resumption Supported\r\n\r\n",
        "199": b"HTTP/1.1 199 Own\r\nx-a: 1\r\n\r\n",
    }.items():
        table.add(f"interim_{name}", request(), service=(Step.READ, interim, OK))
        table.add(f"interim_{name}_then_pause", request(), service=(Step.READ, interim, 0.2, OK))


def add_versions(table: Table) -> None:
    for name, line, headers in (
        ("10", "GET / HTTP/1.0", []),
        ("10_keep_alive", "GET / HTTP/1.0", ["connection: keep-alive"]),
        ("10_close", "GET / HTTP/1.0", ["connection: close"]),
        ("10_head", "HEAD / HTTP/1.0", []),
        ("11_close", "GET / HTTP/1.1", ["connection: close"]),
        ("11_head_close", "HEAD / HTTP/1.1", ["connection: close"]),
        ("12", "GET / HTTP/1.2", []),
        ("20", "GET / HTTP/2.0", []),
        ("lower", "GET / http/1.1", []),
    ):
        table.add(f"version_{name}", request(line, headers))
    table.add("version_10_post", request("POST / HTTP/1.0", ["content-length: 2"], b"ab"))
    table.add("version_10_without_host", b"GET / HTTP/1.0\r\nx-case: @\r\n\r\n")
    table.add(
        "version_10_chunked_response",
        request("GET / HTTP/1.0"),
        service=(Step.READ, response(body=None), b"ok", Step.CLOSE),
    )
    table.add("version_09", b"GET /x\r\n\r\n", timeout=1.5)
    table.add("version_missing", b"GET /\r\nhost: shop\r\nx-case: @\r\n\r\n", timeout=1.5)
    table.add("line_feed_only", b"GET / HTTP/1.1\nhost: shop\nx-case: @\n\n")
    table.add("empty_line_first", b"\r\n" + request())
    for name, headers in {
        "close": ["connection: close"],
        "keep_alive": ["connection: keep-alive", "keep-alive: timeout=5, max=100"],
        "proxy_connection": ["proxy-connection: close"],
        "close_upper": ["Connection: Close"],
    }.items():
        closes = "close" in name
        table.add(
            f"response_connection_{name}",
            request(),
            service=(*answering(headers=headers), *([Step.CLOSE] if closes else [])),
        )
    table.add("response_version_10", request(), service=(*answering(version=b"HTTP/1.0"), Step.CLOSE))
    table.add(
        "response_version_10_keep_alive",
        request(),
        service=answering(headers=["connection: keep-alive"], version=b"HTTP/1.0"),
    )
    table.add("keep_alive_two_requests", request(), Step.AWAIT_HEAD, request("GET /2 HTTP/1.1"), responses=2)
    table.add("keep_alive_ten_requests", *((request(), Step.AWAIT_HEAD) * 10), responses=10)
    table.add(
        "keep_alive_after_post",
        request("POST / HTTP/1.1", ["content-length: 2"], b"ab"),
        Step.AWAIT_HEAD,
        request("GET /2 HTTP/1.1"),
        responses=2,
    )
    table.add(
        "keep_alive_after_head",
        request("HEAD / HTTP/1.1"),
        Step.AWAIT_HEAD,
        request(),
        service=answering(body=b""),
        responses=2,
    )
    table.add("keep_alive_after_pause", request(), Step.AWAIT_HEAD, 1.3, request("GET /2 HTTP/1.1"), responses=2)


def add_request_framing(table: Table) -> None:
    chunked = ["transfer-encoding: chunked"]
    for method in ("GET", "DELETE", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "TRACE", "PROPFIND", "X-OWN"):
        table.add(f"body_{method.lower()}_length", request(f"{method} / HTTP/1.1", ["content-length: 4"], b"body"))
        table.add(f"body_{method.lower()}_chunked", request(f"{method} / HTTP/1.1", chunked, chunks(b"bo", b"dy")))
        table.add(f"body_{method.lower()}_length_0", request(f"{method} / HTTP/1.1", ["content-length: 0"]))
    table.add("body_get_chunked_empty", request(headers=chunked, body=chunks()))
    table.add("body_post_nothing", request("POST / HTTP/1.1"))
    table.add("body_put_nothing", request("PUT / HTTP/1.1"))
    for name, size in {"64k": 2**16, "1m": 2**20, "9m": 9 * 2**20}.items():
        data = bytes(range(256)) * (size // 256)
        table.add(f"body_post_{name}", request("POST / HTTP/1.1", [f"content-length: {size}"], data))
        table.add(
            f"body_post_{name}_chunked",
            request("POST / HTTP/1.1", chunked, chunks(data[: size // 2], data[size // 2 :])),
        )
    table.add("body_get_9m_chunked", request(headers=chunked, body=chunks(b"a" * 9 * 2**20)))
    table.add("body_all_bytes", request("POST / HTTP/1.1", ["content-length: 256"], bytes(range(256))))
    table.add("body_slow", request("POST / HTTP/1.1", ["content-length: 4"]), 0.1, b"bo", 0.1, b"dy")
    table.add(
        "body_slow_chunked", request("POST / HTTP/1.1", chunked), 0.1, b"2\r\nbo\r\n", 0.1, b"2\r\ndy\r\n0\r\n\r\n"
    )
    for name, body in {
        "extension": b"4;a=b\r\nbody\r\n0\r\n\r\n",
        "extension_quoted": b'4;a="b"\r\nbody\r\n0\r\n\r\n',
        "upper_hex": b"A\r\n0123456789\r\n0\r\n\r\n",
        "leading_zero": b"0004\r\nbody\r\n0\r\n\r\n",
        "trailer": chunks(b"body", trailers=b"x-trailer: 1\r\n"),
        "trailers": chunks(b"body", trailers=b"x-trailer: 1\r\nx-other: 2\r\n"),
        "one_byte_chunks": chunks(*[b"a"] * 300),
        "last_zeros": b"4\r\nbody\r\n000\r\n\r\n",
    }.items():
        table.add(f"chunked_{name}", request("POST / HTTP/1.1", chunked, body))
    for name, headers, body in (
        ("length_and_chunked", ["content-length: 4", *chunked], chunks(b"body")),
        ("two_lengths_same", ["content-length: 4", "content-length: 4"], b"body"),
        ("two_lengths_list", ["content-length: 4, 4"], b"body"),
        ("two_lengths_differ", ["content-length: 4", "content-length: 5"], b"body"),
        ("length_plus", ["content-length: +4"], b"body"),
        ("length_negative", ["content-length: -1"], b""),
        ("length_spaces", ["content-length:   4  "], b"body"),
        ("length_zeros", ["content-length: 0004"], b"body"),
        ("length_hex", ["content-length: 0x4"], b"body"),
        ("chunked_upper", ["Transfer-Encoding: Chunked"], chunks(b"body")),
        ("chunked_twice", ["transfer-encoding: chunked", "transfer-encoding: chunked"], chunks(b"body")),
        ("chunked_gzip", ["transfer-encoding: gzip, chunked"], chunks(b"body")),
        ("identity", ["transfer-encoding: identity", "content-length: 4"], b"body"),
        ("chunk_bad_size", chunked, b"zz\r\nbody\r\n0\r\n\r\n"),
        ("chunk_size_0x", chunked, b"0x4\r\nbody\r\n0\r\n\r\n"),
    ):
        table.add(f"irregular_{name}", request("POST / HTTP/1.1", headers, body), timeout=3.0)


def add_statuses(table: Table) -> None:
    known = (
        *(*range(200, 209), 218, 226, 299, *range(300, 309), 399),
        *(*range(400, 419), 420, *range(421, 427), 428, 429, 431, 440, 444, 449, 450, 451, 460, 494, 495, 499),
        *(*range(500, 509), 510, 511, 520, 521, 522, 525, 529, 530, 598, 599),
    )
    for status in known:
        body = None if status in {204, 304} else b"ok"
        table.add(f"status_{status}", request(), service=answering(f"{status} Reason", body=body))
    for status in (600, 700, 999):
        table.add(f"status_{status}", request(), service=answering(f"{status} Reason"))
    for status in (500, 502, 503, 504):
        table.add(
            f"status_{status}_post",
            request("POST / HTTP/1.1", ["content-length: 2"], b"ab"),
            service=answering(f"{status} Reason"),
        )
    for name, reason in {
        "empty": "200 ",
        "missing": "200",
        "own": "200 All Good Here",
        "teapot": "418 I'm a teapot",
        "lower": "404 not found",
        "punctuation": "400 Bad: x, (y) [z]!",
        "latin1": "200 Schön",
        "utf8": b"200 Sch\xc3\xb6n",
        "long": "200 " + "a" * 500,
        "spaces": "200 a  b",
    }.items():
        table.add(f"reason_{name}", request(), service=answering(reason))
    for status in (204, 304):
        table.add(f"no_body_{status}_length", request(), service=answering(f"{status} X", ["content-length: 5"], None))
        table.add(f"no_body_{status}_etag", request(), service=answering(f"{status} X", ['etag: "a"'], None))
        table.add(
            f"no_body_{status}_type", request(), service=answering(f"{status} X", ["content-type: text/html"], None)
        )
        table.add(
            f"no_body_{status}_length_0", request(), service=answering(f"{status} X", ["content-length: 0"], None)
        )
    for name, headers in {
        "length": ["content-length: 12345"],
        "length_0": ["content-length: 0"],
        "chunked": ["transfer-encoding: chunked"],
        "neither": [],
        "gzip": ["content-encoding: gzip", "content-length: 99", "vary: accept-encoding"],
    }.items():
        for status in (200, 404):
            table.add(
                f"head_{status}_{name}", request("HEAD / HTTP/1.1"), service=answering(f"{status} X", headers, None)
            )
    table.add("head_304", request("HEAD / HTTP/1.1"), service=answering("304 X", ["content-length: 9"], None))
    table.add("head_204", request("HEAD / HTTP/1.1"), service=answering("204 X", [], None))
    table.add("status_205_empty", request(), service=answering("205 X", body=b""))


def add_response_headers(table: Table) -> None:
    for name, headers in {
        "own_case": ["X-Own-Case: 1", "ETag: x", "x-lower: 2", "X-UPPER: 3", "Content-Type: text/plain"],
        "www_authenticate_case": ["WWW-Authenticate: Basic"],
        "set_cookie_case": ["Set-Cookie: a=1", "SET-COOKIE: b=2"],
    }.items():
        table.add(f"response_header_{name}", request(), service=answering(headers=headers), has_exact_names=True)
    for count in (50, 98, 100, 120, 150, 500):
        headers = [f"x-r{number}: v" for number in range(count)]
        table.add(f"response_header_count_{count}", request(), service=answering(headers=headers))
    for kilobytes in (4, 16, 32, 60, 70, 96, 200):
        headers = ["x-big: " + "a" * kilobytes * 1024]
        table.add(f"response_header_size_{kilobytes}k", request(), service=answering(headers=headers))
    for name, header in {
        "server": "server: own/1.0",
        "date": "date: Mon, 01 Jan 2024 00:00:00 GMT",
        "via": "via: 1.1 own",
        "empty": "x-a:",
        "spaces": "x-a:   v   ",
        "latin1": "x-a: \xe4",
        "utf8": "x-a: \xc3\xa4",
        "control": "x-a: a\x01b",
        "folded": "x-a: a\r\n b",
        "underscore": "x_a: v",
        "powered_by": "x-powered-by: own",
        "accel_expires": "x-accel-expires: 10",
        "accel_redirect_like": "x-accel-limit-rate: 100000",
        "accel_buffering": "x-accel-buffering: no",
        "runtime": "x-runtime: 0.1",
        "envoy_service_time": "x-envoy-upstream-service-time: 3",
        "envoy_ratelimited": "x-envoy-ratelimited: true",
        "envoy_overloaded": "x-envoy-overloaded: true",
        "envoy_decorator": "x-envoy-decorator-operation: own",
        "envoy_immediate": "x-envoy-immediate-health-check-fail: 1",
        "envoy_degraded": "x-envoy-degraded: 1",
        "alt_svc": 'alt-svc: h3=":443"',
        "hsts": "strict-transport-security: max-age=1",
        "csp": "content-security-policy: default-src 'self'; script-src 'nonce-a'",
        "request_id": "x-request-id: from-service",
        "trailer": "trailer: x-t",
        "upgrade": "upgrade: h2c",
        "upgrade_connection": "connection: upgrade\r\nupgrade: TLS/1.0",
        "proxy_authenticate": "proxy-authenticate: Basic",
        "www_authenticate_twice": 'www-authenticate: Basic realm="a"\r\nwww-authenticate: Bearer',
        "vary_twice": "vary: a\r\nvary: b",
        "link_twice": "link: <a>; rel=next\r\nlink: <b>; rel=prev",
        "cache_control_twice": "cache-control: no-store\r\ncache-control: private",
        "warning": 'warning: 199 - "x"',
        "abreast_version": "x-abreast-version: own",
        "content_type_odd": "content-type: Text/HTML;Charset=UTF-8",
        "expires_odd": "expires: 0",
        "last_modified": "last-modified: Mon, 01 Jan 2024 00:00:00 GMT",
        "etag_weak": 'etag: W/"a"',
    }.items():
        table.add(f"response_header_{name}", request(), service=answering(headers=[header]))
    for name, cookies in {
        "one": ["a=1; Path=/; HttpOnly; SameSite=Lax"],
        "many": [f"c{number}={number}" for number in range(50)],
        "expires": ["a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT, b=2"],
        "same_name": ["a=1", "a=2; Path=/x"],
        "big": ["a=" + "b" * 4096],
        "secure": ["__Host-a=1; Secure; Path=/"],
        "odd": ['a="q, x"; b'],
    }.items():
        headers = [f"set-cookie: {cookie}" for cookie in cookies]
        table.add(f"cookie_set_{name}", request(), service=answering(headers=headers))
    for name, cookie in {
        "simple": "cookie: a=1; b=2",
        "odd": 'cookie: a="1;2"; b; =c',
        "big": "cookie: a=" + "b" * 8000,
        "spaces": "cookie: a=1;b=2;  c=3",
    }.items():
        table.add(f"cookie_sent_{name}", request(headers=[cookie]))
    for name, location in {
        "http": "http://shop/a",
        "https": "https://shop/a",
        "relative": "/a",
        "port": "http://shop:8001/a",
        "other": "https://other.example/a?b=c#d",
        "scheme_relative": "//shop/a",
    }.items():
        table.add(f"redirect_{name}", request(), service=answering("302 Found", [f"location: {location}"], b""))
    for name, headers in {
        "for": ["x-forwarded-for: 1.2.3.4"],
        "for_two": ["x-forwarded-for: 1.2.3.4, 5.6.7.8"],
        "for_repeated": ["x-forwarded-for: 1.2.3.4", "x-forwarded-for: 5.6.7.8"],
        "proto_https": ["x-forwarded-proto: https"],
        "proto_http": ["x-forwarded-proto: http"],
        "proto_odd": ["x-forwarded-proto: wss"],
        "proto_upper": ["x-forwarded-proto: HTTPS"],
        "host": ["x-forwarded-host: shop.example"],
        "port": ["x-forwarded-port: 443"],
        "prefix": ["x-forwarded-prefix: /shop"],
        "real_ip": ["x-real-ip: 1.2.3.4"],
        "rfc7239": ["forwarded: for=1.2.3.4;proto=https;host=shop"],
        "ssl": ["x-forwarded-ssl: on"],
        "scheme": ["x-forwarded-scheme: https", "x-scheme: https", "front-end-https: on"],
        "client_ip": ["client-ip: 1.2.3.4", "true-client-ip: 1.2.3.4", "cf-connecting-ip: 1.2.3.4"],
        "all": ["x-forwarded-for: 1.2.3.4", "x-forwarded-proto: https", "x-forwarded-host: s", "x-forwarded-port: 443"],
    }.items():
        table.add(f"forwarded_{name}", request(headers=headers))


def add_response_framing(table: Table) -> None:
    chunked = response(headers=["transfer-encoding: chunked"], body=None)
    body = bytes(range(256)) * 256
    for name, parts in {
        "chunked": (chunked + chunks(b"bo", b"dy"),),
        "chunked_empty": (chunked + chunks(),),
        "chunked_trailer": (chunked + chunks(b"body", trailers=b"x-trailer: 1\r\n"),),
        "chunked_extension": (chunked + b"4;a=b\r\nbody\r\n0\r\n\r\n",),
        "chunked_pause": (chunked, b"2\r\nbo\r\n", 0.1, b"2\r\ndy\r\n0\r\n\r\n"),
        "chunked_close": (chunked + chunks(b"body"), Step.CLOSE),
        "length_64k": (response(body=body),),
        "length_0": (response(body=b""),),
        "length_pause": (response(headers=["content-length: 4"], body=None), 0.1, b"bo", 0.1, b"dy"),
        "length_4m": (response(body=body * 64),),
        "head_in_pieces": (b"HTTP/1.1 200 OK\r\ncont", 0.1, b"ent-length: 2\r\n\r\nok"),
        "close": (response(body=None), b"body", Step.CLOSE),
        "close_empty": (response(body=None), Step.CLOSE),
        "close_pause": (response(body=None), b"bo", 0.1, b"dy", Step.CLOSE),
        "close_big": (response(body=None), body * 16, Step.CLOSE),
        "close_stated": (response(headers=["connection: close"], body=None), b"body", Step.CLOSE),
        "close_version_10": (response(body=None, version=b"HTTP/1.0"), b"body", Step.CLOSE),
    }.items():
        table.add(f"framing_{name}", request(), service=(Step.READ, *parts))
    for name, parts in {
        "length": (response(headers=["content-length: 10"], body=None), b"body", Step.CLOSE),
        "chunked": (chunked + b"4\r\nbody\r\n", Step.CLOSE),
        "chunk": (chunked + b"8\r\nbody", Step.CLOSE),
        "reset_length": (response(headers=["content-length: 10"], body=None), b"body", 0.1, Step.RESET),
        "reset_close": (response(body=None), b"body", 0.1, Step.RESET),
        "head": (b"HTTP/1.1 200 OK\r\nx-a", Step.CLOSE),
    }.items():
        table.add(f"truncated_{name}", request(), service=(Step.READ, *parts))
        table.add(
            f"truncated_{name}_post",
            request("POST / HTTP/1.1", ["content-length: 2"], b"ab"),
            service=(Step.READ, *parts),
        )
    table.add(
        "truncated_nothing_post",
        request("POST / HTTP/1.1", ["content-length: 2"], b"ab"),
        service=(Step.READ, Step.CLOSE),
    )
    table.add("truncated_nothing", request(), service=(Step.READ, Step.CLOSE))
    for name, data in {
        "length_and_chunked": response(headers=["transfer-encoding: chunked", "content-length: 4"], body=None)
        + chunks(b"ok"),
        "two_lengths": response(headers=["content-length: 2"]),
        "no_version": b"200 OK\r\ncontent-length: 2\r\n\r\nok",
        "status_2_digits": response("20 OK"),
        "status_0": response("000 OK"),
        "line_feed_only": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
        "version_12": response(version=b"HTTP/1.2"),
        "header_no_colon": response(headers=["x-a"]),
        "chunk_bad_size": chunked + b"zz\r\n",
    }.items():
        table.add(f"unreadable_{name}", request(), service=(Step.READ, data, Step.CLOSE), timeout=3.0)
    for coding in ("gzip", "br", "deflate", "zstd", "identity", "own"):
        table.add(
            f"coding_{coding}",
            request(headers=[f"accept-encoding: {coding}"]),
            service=answering(
                headers=[f"content-encoding: {coding}", "vary: accept-encoding"], body=b"\x1f\x8b\x08\x00"
            ),
        )
    table.add(
        "coding_text_uncompressed",
        request(headers=["accept-encoding: gzip"]),
        service=answering(headers=["content-type: text/html"], body=b"a" * 2000),
    )
    table.add(
        "coding_chunked_gzip",
        request(),
        service=(
            Step.READ,
            response(headers=["transfer-encoding: chunked", "content-encoding: gzip"], body=None) + chunks(b"\x1f\x8b"),
        ),
    )
    for name, sent, status, headers in (
        ("one", ["range: bytes=0-1"], "206 Partial Content", ["content-range: bytes 0-1/10"]),
        ("suffix", ["range: bytes=-2"], "206 Partial Content", ["content-range: bytes 8-9/10"]),
        ("multi", ["range: bytes=0-0,2-2"], "206 Partial Content", ["content-type: multipart/byteranges; boundary=a"]),
        ("bad", ["range: bytes=99-"], "416 Range Not Satisfiable", ["content-range: bytes */10"]),
        ("if_range", ["range: bytes=0-1", 'if-range: "a"'], "200 OK", ["accept-ranges: bytes"]),
        ("ignored", ["range: bytes=0-1"], "200 OK", []),
    ):
        table.add(f"range_{name}", request(headers=sent), service=answering(status, headers))


def add_timing(table: Table) -> None:
    for count in (2, 5, 20):
        table.add(f"pipelined_{count}", b"".join(request(f"GET /{n} HTTP/1.1") for n in range(count)), responses=count)
    table.add(
        "pipelined_post_get",
        request("POST / HTTP/1.1", ["content-length: 2"], b"ab") + request("GET /2 HTTP/1.1"),
        responses=2,
    )
    table.add(
        "pipelined_chunked_get",
        request("POST / HTTP/1.1", ["transfer-encoding: chunked"], chunks(b"ab")) + request("GET /2 HTTP/1.1"),
        responses=2,
    )
    table.add(
        "pipelined_head_get",
        request("HEAD / HTTP/1.1") + request("GET /2 HTTP/1.1"),
        responses=2,
        service=(Step.READ, response(body=b"")),
    )
    table.add("pipelined_close_first", request(headers=["connection: close"]) + request("GET /2 HTTP/1.1"))
    table.add("half_closed", request(), Step.END)
    table.add("half_closed_slow_response", request(), Step.END, service=(Step.READ, 0.3, OK))
    table.add(
        "half_closed_post",
        request("POST / HTTP/1.1", ["content-length: 2"], b"ab"),
        Step.END,
        service=(Step.READ, 0.3, OK),
    )
    table.add(
        "half_closed_before_body", request("POST / HTTP/1.1", ["content-length: 9"], b"ab"), Step.END, timeout=3.0
    )
    table.add("half_closed_service", request(), service=(Step.READ, OK, Step.END, 0.5))
    big = b"a" * 2**20
    upload = request("POST / HTTP/1.1", [f"content-length: {4 * 2**20}"])
    refusal = response("413 Too Large", ["connection: close"])
    table.add("early_response_then_close", upload, 0.1, big, service=(refusal, 0.3, Step.CLOSE))
    table.add("early_response_reads_on", upload, big, big, 0.3, big, big, service=(OK, Step.READ))
    table.add(
        "early_response_small", request("POST / HTTP/1.1", ["content-length: 4"]), 0.3, b"body", service=(OK, Step.READ)
    )
    table.add(
        "early_response_chunked",
        request("POST / HTTP/1.1", ["transfer-encoding: chunked"]),
        0.3,
        chunks(b"body"),
        service=(OK, Step.READ),
    )
    stream = response(headers=["transfer-encoding: chunked"], body=None)
    table.add(
        "early_response_duplex",
        request("POST / HTTP/1.1", ["transfer-encoding: chunked"]),
        Step.AWAIT_HEAD,
        chunks(b"body"),
        service=(stream, b"2\r\nbo\r\n", Step.READ, b"2\r\ndy\r\n0\r\n\r\n"),
    )
    table.add("slow_request_line", b"GET / HT", 0.2, b"TP/1.1\r\nhost: shop\r\nx-case: @\r\n\r\n")
    table.add("slow_header", b"GET / HTTP/1.1\r\nhost: shop\r\nx-ca", 0.2, b"se: slow_header\r\n\r\n")
    table.add("slow_response_1s", request(), service=(Step.READ, 1.0, OK))
    slow_head = request()
    table.add("slow_headers_12s", slow_head[:-2], 12.0, b"\r\n", timeout=30.0, is_slow=True)
    table.add(
        "slow_body_12s",
        request("POST / HTTP/1.1", ["content-length: 4"], b"bo"),
        12.0,
        b"dy",
        timeout=30.0,
        is_slow=True,
    )
    table.add("slow_response_12s", request(), service=(Step.READ, 12.0, OK), timeout=30.0, is_slow=True)
    table.add(
        "slow_response_12s_post",
        request("POST / HTTP/1.1", ["content-length: 2"], b"ab"),
        service=(Step.READ, 12.0, OK),
        timeout=30.0,
        is_slow=True,
    )
    table.add(
        "slow_stream_12s",
        request(),
        service=(Step.READ, stream, b"2\r\nbo\r\n", 12.0, b"2\r\ndy\r\n0\r\n\r\n"),
        timeout=30.0,
        is_slow=True,
    )
    table.add(
        "idle_service_closes_at_once",
        request(),
        Step.AWAIT_HEAD,
        0.3,
        request(),
        service=(Step.READ, OK, Step.CLOSE),
        responses=1,
    )


def build() -> dict[str, Case]:
    table = Table()
    for add in (
        add_requests,
        add_request_headers,
        add_connection,
        add_versions,
        add_request_framing,
        add_statuses,
        add_response_headers,
        add_response_framing,
        add_timing,
    ):
        add(table)
    return table.cases


CASES = build()
CORE = (
    *("method_get", "method_head", "method_query", "method_x-own", "method_propfind", "method_options"),
    *("target_absolute_http", "target_absolute_https", "target_encoded_slash", "target_dot_dot", "target_double_slash"),
    *("target_query_repeated", "target_long_16k", "target_non_ascii_utf8", "target_encoded_broken"),
    *(
        "header_count_100",
        "header_count_150",
        "header_size_96k",
        "header_size_200k",
        "repeated_custom",
        "repeated_cookie",
    ),
    *("header_latin1", "header_request_id", "host_port", "login_ntlm"),
    *("upgrade_tls", "upgrade_h2c", "connection_close", "websocket_accepted", "websocket_ignored_body", "te_trailers"),
    *("expect_100_sent", "expect_100_refused_417", "interim_102", "interim_103"),
    *("version_10", "version_10_keep_alive", "keep_alive_two_requests"),
    *("body_get_length", "body_get_chunked", "body_post_1m_chunked", "chunked_trailer", "irregular_length_and_chunked"),
    *("status_204", "status_418", "status_503", "reason_own", "no_body_304_length", "head_200_length"),
    *("response_header_own_case", "response_header_count_150", "response_header_size_96k", "response_header_server"),
    *("cookie_set_many", "redirect_http", "forwarded_proto_https", "framing_chunked", "framing_close"),
    *("truncated_length", "pipelined_5"),
)  # 60 cases that take seconds


async def run_cases(
    port: int, recorder: Recorder | None, cases: Iterable[Case], *, concurrency: int = 8
) -> dict[str, Exchange]:
    """Run each case against a port, and return what both sides received. Without a recorder, only the client's side."""
    if recorder:
        recorder.scripts = {case.key: case.service for case in CASES.values()}
        recorder.forget()
    limit = asyncio.Semaphore(concurrency)

    async def run(case: Case) -> tuple[str, Exchange]:
        async with limit:
            result = await exchange(port, case.client, responses=case.responses, timeout=case.timeout)
        return case.name, result

    results = dict(await asyncio.gather(*map(run, cases)))
    if recorder is None:
        return results
    for name, result in results.items():
        key = name.encode()
        result.requests, result.copies = recorder.live[key], recorder.copies[key]
        result.early_copies = recorder.early_copies[key]
    return results


def compare_copies(result: Exchange) -> list[str]:
    """Return how each copy of a case differs from the live request, with an empty text for an equal one."""
    live = [request for request in result.requests if request.first(b"x-abreast-pair")]
    found = []
    for copy in result.copies:
        pair = copy.first(b"x-abreast-pair")
        original = next((request for request in live if request.first(b"x-abreast-pair") == pair), None)
        if original is None:
            found.append("copy without a live request")
            continue
        before, after = (
            replace(message, headers=tuple(header for header in message.headers if header[0] not in COPY_MARKS))
            for message in (original, copy)
        )
        found.append("; ".join(compare_messages(before, after, frozenset())))
    arms = {
        request.first(b"x-abreast-pair"): int((request.first(b"x-abreast-copies") or b"1").split()[0])
        for request in live
    }
    missing = sum(arms.values()) - len(arms) - len(found)
    return [*found, *["missing"] * missing, *["before the live response"] * len(result.early_copies)]


def differences(
    case: Case,
    direct: Exchange,
    through: Exchange,
    *,
    added_to_requests: frozenset[bytes],
    added_to_responses: frozenset[bytes],
) -> list[str]:
    """Return what the service or the client received differently through a proxy, as short causes."""
    found = [
        *_compare_lists("service", direct.requests, through.requests, added_to_requests, exact=False),
        *_compare_responses(case, direct, through, added_to_responses),
    ]
    return list(dict.fromkeys(found))


def _compare_responses(case: Case, direct: Exchange, through: Exchange, added: frozenset[bytes]) -> Iterator[str]:
    expected = [message for message in direct.responses if not message.is_final]
    actual = [message for message in through.responses if not message.is_final]
    if [message.first_line for message in expected] != [message.first_line for message in actual]:
        yield f"client: interim {_statuses(expected)} → {_statuses(actual)}"
    else:
        yield from _compare_lists("client", expected, actual, added, exact=case.has_exact_names)
    expected = [message for message in direct.responses if message.is_final]
    actual = [message for message in through.responses if message.is_final]
    statuses = _statuses(expected), _statuses(actual)
    if statuses[0] != statuses[1]:
        yield f"client: status {statuses[0]} → {statuses[1]}"
        return
    is_same_ending = direct.ending == through.ending
    for difference in _compare_lists("client", expected, actual, added, exact=case.has_exact_names):
        if not (is_same_ending and difference in HOP_DIFFERENCES):
            yield difference
    if not is_same_ending:
        yield f"client: connection {direct.ending} → {through.ending}"


def _statuses(messages: list[Message]) -> str:
    return ",".join(dict.fromkeys(str(message.status) for message in messages)) or "nothing"


def _compare_lists(
    side: str, direct: list[Message], through: list[Message], added: frozenset[bytes], *, exact: bool
) -> Iterator[str]:
    if len(direct) != len(through):
        yield f"{side}: {len(direct)} → {len(through)} messages"
        return
    for before, after in zip(direct, through, strict=True):
        for difference in compare_messages(before, after, added, exact=exact):
            yield f"{side}: {difference}"


def compare_messages(before: Message, after: Message, added: frozenset[bytes], *, exact: bool = False) -> Iterator[str]:
    parts = before.first_line.split(b" ", 2), after.first_line.split(b" ", 2)
    if parts[0] != parts[1]:
        names = (
            ("version", "status", "reason") if before.first_line[:5] == b"HTTP/" else ("method", "target", "version")
        )
        changed = [
            name for place, name in enumerate(names) if parts[0][place : place + 1] != parts[1][place : place + 1]
        ]
        yield f"{' and '.join(changed)} in the first line"
    expected, actual = _by_name(before, exact), _by_name(after, exact)
    ignored = {b"date"}
    for name in sorted((expected.keys() | actual.keys()) - ignored):
        if expected.get(name) == actual.get(name):
            continue
        if name not in expected and name.lower() in added:
            continue
        kind = "added" if name not in expected else "removed" if name not in actual else "changed"
        yield f"header {name.decode('latin-1')[:40]} {kind}"
    if before.framing != after.framing:
        yield f"framing {before.framing} → {after.framing}"
    if before.body != after.body:
        yield "body"
    if before.trailers != after.trailers:
        yield "trailers"


def _by_name(message: Message, exact: bool) -> dict[bytes, list[bytes]]:
    values: dict[bytes, list[bytes]] = {}
    for name, value in message.headers:
        values.setdefault(name if exact else name.lower(), []).append(value)
    return values
