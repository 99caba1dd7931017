"""Fuzz the readers of foreign input: python bench/fuzz.py PART [--minutes N] [--seed S].

A failure prints the shortest input that hypothesis found, and the seed of its round. The exit code is 1 then.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import datetime as dt
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_plus

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from abreast.errors import CaptureError, ErrorReporter
from abreast.export.exporter import ExporterPool
from abreast.export.queue import CaptureQueue
from abreast.export.redaction import Redactor
from abreast.export.routes import RouteResolver
from abreast.export.serializer import CaptureSerializer
from abreast.protocol.capture import Answer, Body, Capture
from abreast.protocol.join import Keys
from abreast_sidecar.collector.message import to_recorder
from abreast_sidecar.collector.server import Collector, Connection
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rule_document import RuleError, parse_rules
from abreast_sidecar.compare.rules import CompareOptions, RuleSet
from abreast_sidecar.envoy.config import ConfigError, parse_config
from abreast_sidecar.ingest.evaluate import evaluate_entry
from abreast_sidecar.ingest.stream import parse_entry
from abreast_sidecar.settings import CollectorSettings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.writer import PairWriter
from support_captures import encode
from support_corpus import pairs
from support_database import LedgerDatabase
from support_pairs import SERVICE, capture
from support_serve import Ledger, QuerySidecar, run_sidecar

ROOT = Path(__file__).parents[1]
EXAMPLES_PER_ROUND = 300
MAX_CPU_S = 5.0  # for one input of some KB
KEYS = Keys(SERVICE, 0)
RAISED = "its comparison raised"

Check = Callable[[st.DataObject], None]
Part = Callable[[], contextlib.AbstractContextManager[Check]]

WORDS = [
    b"\0", b"\n", b"\n\n", b"\r\n", b" ", b"-", b"0", b"-1", b"9" * 30, b"1e999", b"NaN", b"\xff", b"\xc3", b"\xed\xa0\x80",
    rb"\ud800", rb"\u0000", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b"<", b">", b"&", b"%", b"%00", b"%ff", b"=", b";",
    b"null", b"true", b'{"a":', b"[" * 500, b'{"a":' * 500, b"<a>" * 500, b"a" * 5000, b"<!--", b"<![CDATA[", b"&#0;", b"--b",
    "ſ".encode(), "İ".encode(), "\u2028".encode(), "\U0001f600".encode(), b"**", b".*", b"[*]", b"(", b"!", b"!!binary", b"&a", b"*a",
]  # fmt: skip


def mutate(data: st.DataObject, content: bytes, max_changes: int = 4) -> bytes:
    """Replace, delete, insert or double parts of the content."""
    for _ in range(data.draw(st.integers(0, max_changes))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.sampled_from([0, 0, 1, 2, 8, 40])))
        word = data.draw(st.sampled_from(WORDS) | st.binary(max_size=6) | st.just(content[start:end] * 2))
        content = content[:start] + word + content[end:]
    return content


@contextlib.contextmanager
def bounded_time() -> Iterator[None]:
    """Fail if the block takes more CPU time than any input of its size needs."""
    start = time.process_time()
    yield
    spent = time.process_time() - start
    assert spent < MAX_CPU_S, f"took {spent:.1f} s"


MESSAGE = (
    b"1 shop pair-1 old live 2 1 complete 4 1000000 1002000 1005000 3 3 - 2 400000 envoy:00ff\n"
    b":method:POST\n:path:/search?q=a\n:authority:shop.internal\ncookie:id=1\nx-abreast-copies:2 0000000000900\n\n"
    b":status:200\ncontent-type:application/json\nx-note:\xe9\n\ngrpc-status:0\n\nq=1{}"
)


@contextlib.contextmanager
def fuzz_collector() -> Iterator[Check]:
    """Check that a message is a capture that can be compared, or an error, and that the server never raises."""
    options = CollectorSettings(service="shop")
    pool = ExporterPool(options, CaptureQueue(options), RouteResolver(None), ErrorReporter())
    serializer = CaptureSerializer(options, Redactor("key"))

    class Receiver(Collector):
        def accept(self, message: bytes, _key: bytes) -> int:
            try:
                row = serializer.serialize(to_recorder(message, pool))
            except CaptureError:
                return 400
            record = evaluate_entry(
                parse_entry(KEYS, b"5-1", {b"pair": row[0].encode(), b"x": row[3]}), CompareOptions()
            )
            assert record.result.outcome != "undecodable", record.result.reason
            return 202

    receiver = Receiver(options)

    def check(data: st.DataObject) -> None:
        message = mutate(data, MESSAGE)
        with bounded_time():
            receiver.accept(message, b"")
            receiver.accept_logs(message, b"")
            head = b"POST %b HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (
                data.draw(st.sampled_from([b"/", b"/logs"])),
                len(message),
            )
            connection, stream = Connection(receiver), mutate(data, head + message)
            for start in range(0, len(stream), data.draw(st.sampled_from([100, 100_000]))):
                connection.data_received(stream[start : start + 100])

    yield check


@contextlib.contextmanager
def fuzz_entry() -> Iterator[Check]:
    """Check that any entry of the stream becomes a record that Postgres accepts."""
    with PostgresServer() as server, asyncio.Runner() as runner:
        database = LedgerDatabase(server)
        writer = PairWriter(database.url, examples_per_finding=3)
        blobs = [
            encode(capture("p", "old")),
            encode(capture("p", "new", "shadow", {"price": "1"})),
            encode(capture("p", "old", "baseline", {"b": 2})),
        ]

        def check(data: st.DataObject) -> None:
            names = [b"old:live:1", b"new:shadow:1", b"old:baseline:1"]
            fields = {
                mutate(data, b"pair", 1): mutate(data, b"0d7c1e3a-0000-4000-8000-000000000001", 1),
                mutate(data, b"why", 1): data.draw(st.sampled_from([b"joined", b"timed_out", b"late"])),
                **{mutate(data, name, 1): mutate(data, blob) for name, blob in zip(names, blobs, strict=True)},
            }
            entry_id = data.draw(st.sampled_from([b"5-1", b"1700000000000-0", b"%d-%d" % (2**64 - 1, 2**64 - 1)]))
            with bounded_time():
                record = evaluate_entry(parse_entry(KEYS, entry_id, fields), CompareOptions())
            assert RAISED not in record.result.reason, record.result.reason
            runner.run(writer.write([record]))

        yield check
        runner.run(writer.close())


TYPES = [
    "application/json", "application/problem+json", "application/x-ndjson", "text/event-stream", "text/html", "application/xml",
    "text/plain; charset=utf-16", "text/csv", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "image/png",
    "application/grpc", "application/graphql-response+json", "", "\xff/;;charset=nonsense",
]  # fmt: skip
RULES = parse_rules(
    'rules: [{action: unordered, path: "$.**"}, {action: tolerate, path: "$.a.**", relative: 10%}, {action: keyed-by, path: "$.*", by: id}, '
    '{action: ignore, header: "x-*"}, {action: expect, path: "$.b", old: "1", new: "2"}]'
)


@contextlib.contextmanager
def fuzz_compare() -> Iterator[Check]:
    """Check that a comparison never raises, and that a capture equals itself."""
    corpus = pairs()

    def damage(data: st.DataObject, side: Capture) -> Capture:
        answer = side.answer
        content = mutate(data, answer.body.content)
        headers = [
            *answer.headers,
            *([("content-type", data.draw(st.sampled_from(TYPES)))] if data.draw(st.booleans()) else []),
        ]
        if data.draw(st.sampled_from([False, False, True])):
            headers.append(
                ("content-encoding", data.draw(st.sampled_from(["gzip", "br", "zstd", "deflate", "gzip, gzip", "x"])))
            )
        length = len(content) + data.draw(st.sampled_from([0, 0, 0, 1, 100_000]))
        body = Body(content, length, "" if length == len(content) else "ab" * 16)
        status = data.draw(st.sampled_from([answer.status, 0, 304, 404, 500, 999, -1]))
        return replace(side, answer=Answer(status, tuple(headers), body, answer.trailers))

    def check(data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(corpus))
        old, new = damage(data, pair.old), damage(data, pair.new)
        baseline = replace(damage(data, pair.old), role="baseline")
        options = CompareOptions(rule_set=data.draw(st.sampled_from([RuleSet(), RULES])))
        with bounded_time():
            result = compare_pair([old, new, baseline], options)
            again = compare_pair([baseline, new, old], options)
            itself = compare_pair([old, replace(old, version="new", role="shadow")], options)
            json.dumps([difference.to_record() for difference in result.all_differences])
        assert [item.place for item in result.differences] == [item.place for item in again.differences]
        assert not itself.differences, [difference.to_record() for difference in itself.differences]

    yield check


RULES_TEXT = (
    b"rules:\n- {name: a, action: ignore, path: '$.items[*].price', service: shop, endpoint: 'GET /a/{id}', status: 404->2xx, expires: 2030-01-31}\n"
    b"- {action: tolerate, path: $.a, relative: 10%, absolute: 1e3}\n- {action: expect, path: $.b, old: null, new: 'x'}\n"
    b"- {action: unordered, path: '$.**.a[*].*', release: 2.*}\n- {action: waive-coverage, endpoint: GET /events}\n"
    b"- {action: ignore, header: 'x-*', kind: changed}\n"
)


@contextlib.contextmanager
def fuzz_rules() -> Iterator[Check]:
    """Check that a document is a set of rules, which a comparison can apply, or an error with its place."""
    sides = [capture("p", "old", "live", {"a": [1], "b": None}), capture("p", "new", "shadow", {"a": [2], "b": "x"})]

    def check(data: st.DataObject) -> None:
        text = mutate(data, RULES_TEXT, 6).decode("utf-8", data.draw(st.sampled_from(["replace", "surrogateescape"])))
        with bounded_time():
            try:
                rules = parse_rules(text)
            except RuleError:
                return
            compare_pair(sides, CompareOptions(rule_set=rules))

    yield check


@contextlib.contextmanager
def fuzz_config() -> Iterator[Check]:
    """Check that a file is a configuration, whose services can be built, or an error with lines."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/config.md").read_text(), re.DOTALL)

    def check(data: st.DataObject) -> None:
        text = mutate(data, data.draw(st.sampled_from(blocks)).encode(), 6).decode("utf-8", "replace")
        with bounded_time(), contextlib.suppress(ConfigError):
            parse_config(text).build_services({})  # must accept what the check accepts

    yield check


TARGETS = [
    b"/", b"/?service=shop&noise=1", b"/findings/1", b"/findings/99999999999999999999", b"/pairs/0d7c1e3a-0000-4000-8000-000000000001",
    b"/v1/services/shop/verdict?gate=1&max_mismatch=0.1&confidence=0.9&since=2026-01-01T00:00:00Z&until=2026-02-01T00:00:00Z&release=a",
    b"/v1/services/shop/causes?noise=1&page_size=2&page_token=abc", b"/metrics", b"/style.css", b"/readyz", b"/login?next=/", b"/logout",
]  # fmt: skip
NO_TARGET = re.compile(rb"[\0-\x20\x7f]")


@contextlib.contextmanager
def fuzz_page() -> Iterator[Check]:
    """Check that no request is answered with a 5xx, and that each page has its policy and escapes what it shows."""
    with RedisServer() as redis, PostgresServer() as postgres, asyncio.Runner() as runner:
        database = LedgerDatabase(postgres)
        ledger = Ledger(database.url)
        endpoint = ledger.endpoint()
        finding = ledger.finding(endpoint, "$.price", count=3)
        ledger.pair(endpoint, finding, at=dt.datetime.now(dt.UTC))
        serving = run_sidecar(redis.url, database.url, kind=QuerySidecar)
        sidecar = runner.run(_call(serving.__aenter__))
        port = sidecar.sidecar.http.port

        async def send(method: bytes, target: bytes, body: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"%b %b HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\nconnection: close\r\n"
                b"content-type: application/x-www-form-urlencoded\r\ncontent-length: %d\r\n\r\n%b"
                % (method, target, len(body), body)
            )
            async with asyncio.timeout(30):
                answer = await reader.read()
            writer.close()
            return answer

        def check(data: st.DataObject) -> None:
            target = b"/" + NO_TARGET.sub(b"", mutate(data, data.draw(st.sampled_from(TARGETS)))).lstrip(b"/")
            method = data.draw(st.sampled_from([b"GET", b"GET", b"GET", b"HEAD", b"POST", b"OPTIONS"]))
            body = mutate(data, b"token=abc&csrf=def&next=/") if method == b"POST" else b""
            answer = runner.run(send(method, target, body))
            status = int(answer[9:12] or b"0")
            assert 200 <= status < 500, answer[:500]
            head, _, page = answer.partition(b"\r\n\r\n")
            if b"text/html" in head:
                assert b"content-security-policy" in head.lower()
                assert b"<!--" not in page
                assert b"<![CDATA[" not in page

        try:
            yield check
        finally:
            runner.run(_call(lambda: serving.__aexit__(None, None, None)))


async def _call(function: Callable[[], Awaitable[Any]]) -> Any:
    return await function()


def _token(data: st.DataObject) -> str:
    groups = data.draw(
        st.lists(st.sampled_from(["kX7", "q9T", "Zr5", "Lm2", "8Wv", "bN4", "Yc3", "P6d"]), min_size=8, max_size=12)
    )
    return "".join(groups)


def _jwt(data: st.DataObject) -> str:
    parts = (
        b'{"alg":"HS256"}',
        json.dumps({"sub": data.draw(st.integers(0, 10**9))}).encode(),
        data.draw(st.binary(min_size=16, max_size=32)),
    )
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def _card(data: st.DataObject) -> str:
    digits = "4" + "".join(map(str, data.draw(st.lists(st.integers(0, 9), min_size=14, max_size=14))))
    total = sum(sum(divmod(2 * int(digit), 10)) if index % 2 == 0 else int(digit) for index, digit in enumerate(digits))
    return digits + str(-total % 10)


def _word(data: st.DataObject) -> str:
    return f"hunter{data.draw(st.integers(10_000, 99_999))}"


SHAPED = [_token, _jwt, _card]
NAMES = [
    "password",
    "newPassword",
    "API_KEY",
    "x-auth-token",
    "client secret",
    "sessionId",
    "card_number",
    "db.password",
    "pin",
]
FILLER = st.text(st.sampled_from("abc 12.,-/é€\n\t:"), max_size=30)
# How a format embeds a text, by its content type.
WRAPPERS: dict[str, list[Callable[[str, str], str]]] = {  # (name, value) -> document
    "application/json": [
        lambda name, value: json.dumps({"a": [{name: value}], "b": 1}),
        lambda name, value: json.dumps({"a": json.dumps({name: value})}),
        lambda name, value: json.dumps({"a": base64.b64encode(json.dumps({name: value}).encode()).decode()}),
        lambda name, value: json.dumps({name: {"x": [value]}}, indent=1),
        lambda name, value: json.dumps({"a": "é", name: value}, ensure_ascii=False)[:-1],
        lambda name, value: json.dumps({"variables": {"input": {name: value}}, "query": "mutation { a }"}),
    ],
    "application/x-ndjson": [lambda name, value: '{"a": 1}\n' + json.dumps({name: value}) + "\n"],
    "text/event-stream": [lambda name, value: f"event: a\ndata: {json.dumps({name: value})}\n\n"],
    "application/x-www-form-urlencoded": [lambda name, value: f"a=1&{quote(name)}={quote(value)}&b=2"],
    "application/xml": [
        lambda name, value: f"<a><{name.replace(' ', '_')}>{value}</{name.replace(' ', '_')}></a>",
        lambda name, value: f'<a><b id="1" {name.replace(" ", "_")}="{value}"/></a>',
    ],
    "text/html": [
        lambda name, value: f"<p>x</p><input type=hidden name='{name.replace(' ', '_')}' value='{value}'>",
        lambda name, value: f"<TEXTAREA rows=2 id={name.replace(' ', '_')}>{value}</TEXTAREA>",
    ],
    "text/plain": [lambda name, value: f"{name.replace(' ', '_')}={value}", lambda name, value: f"{name.replace(' ', '_')}: {value}"],
    "multipart/form-data; boundary=b": [
        lambda name, value: f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--b--\r\n'
    ],
}  # fmt: skip


@contextlib.contextmanager
def fuzz_redaction() -> Iterator[Check]:
    """Check that no secret survives, that only equal ones have equal hashes, and that the time is bounded."""
    redactor = Redactor("key")

    def redact(document: str, content_type: str) -> str:
        raw = document.encode("utf-8", "replace")
        return redactor.redact_body(Body(raw, len(raw)), content_type).content.decode("utf-8", "replace")

    def check(data: st.DataObject) -> None:
        is_named = data.draw(st.booleans())
        make = _word if is_named else data.draw(st.sampled_from(SHAPED))
        secret, other = make(data), make(data)
        name = data.draw(st.sampled_from(NAMES if is_named else ["note", "a", "x-info"]))
        before, after = ("", "") if is_named else (f"{data.draw(FILLER)} ", f" {data.draw(FILLER)}")
        content_type = data.draw(st.sampled_from(sorted(WRAPPERS)))
        wrap = data.draw(st.sampled_from(WRAPPERS[content_type]))
        redacted = redact(wrap(name, before + secret + after), content_type)
        encoded = base64.b64encode(json.dumps({name: secret}).encode()).decode()
        assert secret not in unquote_plus(redacted), redacted
        assert secret == other or encoded not in redacted, redacted
        assert redacted == redact(wrap(name, before + secret + after), content_type)
        assert (redacted == redact(wrap(name, before + other + after), content_type)) == (secret == other)
        for target in (f"q={quote(before + secret)}" if not is_named else f"{quote(name)}={secret}",):
            assert secret not in unquote_plus(redactor.redact_query(target))
        unit = mutate(data, wrap(name, secret).encode()).decode("utf-8", "replace")
        with bounded_time():
            for kind in (content_type, "text/plain", "application/json"):
                redact(unit * (20_000 // (len(unit) + 1) + 1), kind)

    yield check


PARTS: dict[str, Part] = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}


def run(part: Part, minutes: float, first_seed: int) -> int:
    """Check rounds of inputs until the time is over. Return the number of inputs."""
    end = time.monotonic() + 60 * minutes
    count = round_number = 0
    with part() as check:
        while time.monotonic() < end:

            def count_input(data: st.DataObject) -> None:
                nonlocal count
                count += 1
                check(data)

            round_seed = first_seed + round_number
            profile = settings(
                max_examples=EXAMPLES_PER_ROUND, database=None, deadline=None, suppress_health_check=list(HealthCheck)
            )
            try:
                seed(round_seed)(profile(given(st.data())(count_input)))()
            except BaseException:
                print(f"seed {round_seed} fails after {count} inputs", flush=True)
                raise
            round_number += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each part")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name in PARTS if options.part == "all" else [options.part]:
        count = run(PARTS[name], options.minutes, options.seed)
        print(f"{name}: {count} inputs, no failure", flush=True)


if __name__ == "__main__":
    main()
