"""Plant regressions in noisy places: python bench/noisy.py [--pairs N] [--share X] [--clean N]
[--only TEXT] [--unredacted].

Each service returns a value that differs in every response, beside a fresh id and a time. New breaks the value in every
response: it expires an hour later, or a flag is always false. The captures run through comparison, writer and noise
classification on a real Postgres. Clean runs return several of these values from two equal versions. All runs are seeded.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import orjson

from abreast.export.redaction import EVERYTHING, Redactor
from abreast.protocol.capture import Answer, Body, Capture, Request, Role, Version
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.writer import PairWriter

PAIRS_PER_S = 10
BATCH = 200  # pairs between two classifications
NEW_WEIGHT = 0.3  # share of users on new in every second service
START = float(int(time.time()))
HOUR, DAY = 3600.0, 86_400.0
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty")
Dice = random.Random
Value = Callable[[Dice, float, bool], Any]  # by dice, time in the service, and whether the code is broken


def fresh_uuid(dice: Dice) -> str:
    return str(UUID(int=dice.getrandbits(128), version=4))


def fresh_token(dice: Dice, chars: int = 24) -> str:
    return base64.urlsafe_b64encode(dice.randbytes(chars))[:chars].decode()


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def http_date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(seconds, UTC), usegmt=True)


def jwt(header: dict[str, Any], claims: dict[str, Any], dice: Dice) -> str:
    parts = (orjson.dumps(header), orjson.dumps(claims), dice.randbytes(32))
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def to_json(value: Any) -> str:
    return orjson.dumps(value).decode()


def recommend(dice: Dice, bad: Callable[[dict[str, Any]], dict[str, Any]] = dict, count: int = 4) -> list[Any]:
    """Return random products, as a recommender that explores."""
    products = [
        {
            "sku": f"P-{dice.randrange(10_000):04}",
            "price": dice.randrange(100, 9000) / 100,
            "in_stock": dice.random() < 0.8,
        }
        for _ in range(count)
    ]
    return [bad(product) for product in products]


@dataclass(frozen=True)
class Plant:
    name: str
    value: Value
    format: str = "json"  # json, html, csv, text, or the name of a header
    is_inseparable: bool = False  # no test of responses can find it


def claims_plant(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]], header: dict[str, Any] | None = None
) -> Plant:
    def value(dice: Dice, now: float, bad: bool) -> str:
        claims = {
            "jti": fresh_uuid(dice),
            "sub": f"u{dice.randrange(99)}",
            "iat": int(now),
            "exp": int(now + HOUR),
            "scope": "read",
        }
        return jwt(header if bad and header else {"alg": "HS256"}, change(claims) if bad else claims, dice)

    return Plant(f"JWT: {name}", value)


def payload_plant(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    def value(dice: Dice, now: float, bad: bool) -> str:
        payload = {
            "trace": fresh_uuid(dice),
            "at": iso(now),
            "total": 129.5,
            "currency": "EUR",
            "ok": True,
            "score": dice.gauss(50, 1),
            "beta": dice.random() < 0.5,
        }
        return to_json(change(payload) if bad else payload)

    return Plant(f"JSON in text: {name}", value)


def script_plant(name: str, change: Callable[[str], str]) -> Plant:
    def value(dice: Dice, now: float, bad: bool) -> str:
        state = to_json(
            {
                "cart": {"total": 40, "currency": "EUR"},
                "beta": True,
                "csrf": fresh_token(dice),
                "views": dice.randrange(1000),
            }
        )
        page = f"<script>window.__STATE__ = {state};</script><p>Hello</p>"
        return change(page) if bad else page

    return Plant(f"inline script: {name}", value, "html")


def csv_plant(name: str, change: Callable[[list[Any]], list[Any]]) -> Plant:
    def value(dice: Dice, now: float, bad: bool) -> str:
        rows = [
            [
                f"r{dice.randrange(10**6)}",
                f"{dice.gauss(50, 1):.2f}",
                "EUR",
                str(dice.random() < 0.5).lower(),
                iso(now + HOUR),
            ]
            for _ in range(3)
        ]
        return (
            "id,price,currency,active,until\n" + "\n".join(",".join(change(row) if bad else row) for row in rows) + "\n"
        )

    return Plant(f"CSV: {name}", value, "csv")


def number(name: str, broken: Callable[[float], Any], noise: float = 0.02, digits: int = 3) -> Plant:
    def value(dice: Dice, now: float, bad: bool) -> Any:
        score = round(dice.gauss(80, 80 * noise), digits)
        return broken(score) if bad else score

    return Plant(f"number: {name}", value)


def url(name: str, good: str, broken: str, **extra: Any) -> Plant:
    def value(dice: Dice, now: float, bad: bool) -> str:
        template = broken if bad else good
        return template.format(
            uuid=fresh_uuid(dice),
            n=dice.randrange(10**6),
            word=dice.choice(WORDS),
            ab=dice.choice("AB"),
            exp=int(now + HOUR),
            late=int(now + 2 * HOUR),
            over=int(now - HOUR),
            sig=dice.randbytes(16).hex(),
        )

    return Plant(f"URL: {name}", value, **extra)


PLANTS: tuple[Plant, ...] = (
    Plant("time: expires an hour later", lambda r, t, bad: iso(t + HOUR * (1 + bad))),
    Plant("time: already over", lambda r, t, bad: iso(t + HOUR * (1 - 2 * bad))),
    Plant("time: expires in 2 minutes, already over", lambda r, t, bad: iso(t + 120 * (1 - 2 * bad))),
    Plant("time: Unix seconds an hour later", lambda r, t, bad: int(t + HOUR * (1 + bad))),
    Plant("time: Unix milliseconds already over", lambda r, t, bad: int(1000 * (t + HOUR * (1 - 2 * bad)))),
    Plant("time: Unix seconds as text an hour later", lambda r, t, bad: str(int(t + HOUR * (1 + bad)))),
    Plant("time: fractional Unix seconds an hour later", lambda r, t, bad: t + HOUR * (1 + bad)),
    Plant("time: HTTP date an hour later", lambda r, t, bad: http_date(t + HOUR * (1 + bad))),
    Plant("time: of a random age, a day older", lambda r, t, bad: iso(t - r.random() * DAY - DAY * bad)),
    Plant("time: generated_at a minute stale", lambda r, t, bad: iso(t - 60 * bad)),
    Plant("time: in a text, an hour later", lambda r, t, bad: f"Hold for {r.choice(WORDS)} ends at {iso(t + HOUR * (1 + bad))}"),
    Plant("time: in another zone", lambda r, t, bad: iso(t).replace("Z", "+02:00") if bad else iso(t)),
    Plant("time: seconds for milliseconds", lambda r, t, bad: int(t) if bad else int(t * 1000)),
    Plant("flag: always false", lambda r, t, bad: r.random() < 0.5 and not bad),
    Plant("flag: always true", lambda r, t, bad: r.random() < 0.5 or bad),
    Plant("flag: true in 10% instead of 50%", lambda r, t, bad: r.random() < (0.1 if bad else 0.5)),
    Plant("flag: rare true lost", lambda r, t, bad: r.random() < 0.1 and not bad),
    Plant("flag: as a text", lambda r, t, bad: str(r.random() < 0.5) if bad else r.random() < 0.5),
    Plant("flag: null for false", lambda r, t, bad: (r.random() < 0.5) or (None if bad else False)),
    Plant("flag: inverted, in half of the responses", lambda r, t, bad: (r.random() < 0.5) ^ bad, is_inseparable=True),
    Plant("variant: always A", lambda r, t, bad: "A" if bad else r.choice("AB")),
    Plant("variant: always the middle one of three", lambda r, t, bad: "b-medium" if bad else r.choice(("a-large", "b-medium", "c-small"))),
    Plant("variant: never the last of three", lambda r, t, bad: r.choice("AB" if bad else "ABC")),
    Plant("variant: an unknown one", lambda r, t, bad: "default" if bad else r.choice(WORDS)),
    Plant("variant: capitals", lambda r, t, bad: r.choice(WORDS).upper() if bad else r.choice(WORDS)),
    Plant("variant: empty", lambda r, t, bad: "" if bad else r.choice(WORDS)),
    number("1% higher", lambda x: x * 1.01),
    number("10% higher", lambda x: x * 1.1, 0.1),
    number("5% lower", lambda x: x * 0.95),
    number("ten times", lambda x: x * 10, 0.3),
    number("always 0", lambda x: 0),
    number("negative", lambda x: -x),
    number("rounded to an integer", round, 0.3),
    number("capped", lambda x: min(x, 80.0)),
    number("frozen", lambda x: 81.25),
    number("as a text", str),
    number("with half the spread", lambda x: 80 + (x - 80) / 4),
    Plant("number: amount in a text 1% higher", lambda r, t, bad: f"{r.gauss(80, 1) * (1 + bad / 100):.2f}"),
    Plant("number: amount with currency 10% higher", lambda r, t, bad: f"{r.gauss(80, 4) * (1 + bad / 10):.2f} EUR"),
    Plant("number: Fahrenheit", lambda r, t, bad: round(r.gauss(20, 3) * (1.8 if bad else 1) + 32 * bad, 1)),
    Plant("number: miles in a text", lambda r, t, bad: f"{r.gauss(12, 1) / (1.6 if bad else 1):.1f} away"),
    Plant("number: counter twice as fast", lambda r, t, bad: int((t - START) * PAIRS_PER_S * (1 + bad)) + 100),
    Plant("number: counter that stands still", lambda r, t, bad: 100 if bad else int((t - START) * PAIRS_PER_S) + 100),
    Plant("number: counter behind by 20", lambda r, t, bad: int((t - START) * 100) - 20 * bad + 100),
    Plant("number: days left, one less", lambda r, t, bad: r.randrange(5, 9) - bad),
    Plant("number: a dice that never shows 6", lambda r, t, bad: r.randint(1, 6 - bad)),
    Plant("number: 0.01% higher", lambda r, t, bad: r.gauss(80, 2) * (1 + bad / 10_000), is_inseparable=True),
    url("http", "https://ads.example.com/c/{uuid}", "http://ads.example.com/c/{uuid}"),
    url("http, random number", "https://ads.example.com/c?cb={n}", "http://ads.example.com/c?cb={n}"),
    url("http, random word", "https://ads.example.com/{word}", "http://ads.example.com/{word}"),
    url("staging host", "https://ads.example.com/c/{uuid}", "https://ads.staging.example.com/c/{uuid}"),
    url("staging host, random number", "https://ads.example.com/c?cb={n}", "https://staging.example.com/c?cb={n}"),
    url("staging host, random word", "https://ads.example.com/{word}", "https://staging.example.com/{word}"),
    url("other port", "https://ads.example.com/c?cb={n}", "https://ads.example.com:8443/c?cb={n}"),
    url("variant always A", "https://ads.example.com/c?id={uuid}&v={ab}", "https://ads.example.com/c?id={uuid}&v=A"),
    url("campaign lost", "https://ads.example.com/c?cb={n}&utm=spring", "https://ads.example.com/c?cb={n}"),
    url("other size", "https://img.example.com/{n}?w=640", "https://img.example.com/{n}?w=320"),
    url("expires an hour later", "https://s3.example.com/f?expires={exp}&signature={sig}", "https://s3.example.com/f?expires={late}&signature={sig}"),
    url("already over", "https://s3.example.com/f?expires={exp}&signature={sig}", "https://s3.example.com/f?expires={over}&signature={sig}"),
    url("signature empty", "https://s3.example.com/f?expires={exp}&signature={sig}", "https://s3.example.com/f?expires={exp}&signature="),
    url("other path", "https://ads.example.com/click/{word}/{n}", "https://ads.example.com/view/{word}/{n}"),
    url("wrong id among fresh ids", "https://ads.example.com/c/{uuid}", "https://ads.example.com/c/{uuid}", is_inseparable=True),
    Plant("query string: variant always A", lambda r, t, bad: urlencode({"sid": fresh_token(r), "v": "A" if bad else r.choice("AB"), "q": "x"})),
    Plant("query string: value changed", lambda r, t, bad: urlencode({"sid": r.randrange(10**6), "page": 2 if bad else 1, "q": "x"})),
    Plant("query string: number 10% higher", lambda r, t, bad: urlencode({"sid": fresh_token(r), "bid": round(r.gauss(9, 0.5) * (1 + bad / 10), 3)})),
    Plant("recommendations: sold out", lambda r, t, bad: recommend(r, (lambda x: x | {"in_stock": False}) if bad else dict)),
    Plant("recommendations: price 50% higher", lambda r, t, bad: recommend(r, (lambda x: x | {"price": x["price"] * 1.5}) if bad else dict)),
    Plant("recommendations: one less", lambda r, t, bad: recommend(r, count=4 - bad)),
    Plant("recommendations: none", lambda r, t, bad: recommend(r, count=4 * (not bad))),
    Plant("recommendations: always the same", lambda r, t, bad: recommend(random.Random(1) if bad else r)),
    Plant("recommendations: without price", lambda r, t, bad: recommend(r, (lambda x: {k: x[k] for k in x if k != "price"}) if bad else dict)),
    payload_plant("total changed", lambda x: x | {"total": 130.5}),
    payload_plant("currency lost", lambda x: {k: x[k] for k in x if k != "currency"}),
    payload_plant("flag false", lambda x: x | {"ok": False}),
    payload_plant("score 10% higher", lambda x: x | {"score": x["score"] * 1.1}),
    payload_plant("random flag always false", lambda x: x | {"beta": False}),
    claims_plant("expires an hour later", lambda x: x | {"exp": x["exp"] + 3600}),
    claims_plant("already over", lambda x: x | {"exp": x["iat"] - 60}),
    claims_plant("scope admin", lambda x: x | {"scope": "admin"}),
    claims_plant("without subject", lambda x: {k: x[k] for k in x if k != "sub"}),
    claims_plant("not signed", lambda x: x, {"alg": "none"}),
    csv_plant("price 10% higher", lambda x: [x[0], f"{float(x[1]) * 1.1:.2f}", *x[2:]]),
    csv_plant("currency changed", lambda x: [*x[:2], "USD", *x[3:]]),
    csv_plant("flag always false", lambda x: [*x[:3], "false", x[4]]),
    csv_plant("column lost", lambda x: x[:4]),
    csv_plant("columns swapped", lambda x: [x[0], x[2], x[1], *x[3:]]),
    script_plant("total changed", lambda x: x.replace('"total":40', '"total":41')),
    script_plant("flag false", lambda x: x.replace('"beta":true', '"beta":false')),
    script_plant("currency lost", lambda x: x.replace(',"currency":"EUR"', "")),
    script_plant("views always 0", lambda x: x[: x.index('"views":') + 8] + "0" + x[x.index("}"):]),
    Plant("HTML: link to staging", lambda r, t, bad: f'<a href="https://{"staging" if bad else "www"}.example.com/{r.choice(WORDS)}">go</a>', "html"),
    Plant("HTML: nobody left", lambda r, t, bad: f"<p>{0 if bad else r.randrange(1, 60)} people look at this</p>", "html"),
    Plant("HTML: hidden variant always A", lambda r, t, bad: f'<input name="v" value="{"A" if bad else r.choice("AB")}">', "html"),
    Plant("token: repeated", lambda r, t, bad: fresh_token(random.Random(5) if bad else r)),
    Plant("token: shorter", lambda r, t, bad: fresh_token(r, 16 if bad else 24)),
    Plant("token: empty", lambda r, t, bad: "" if bad else fresh_token(r)),
    Plant("cursor: Base64 of JSON, other size", lambda r, t, bad: base64.b64encode(orjson.dumps({"after": r.randrange(10**6), "size": 10 if bad else 20})).decode()),
    Plant("header: fresh location on staging", lambda r, t, bad: f"https://{'staging' if bad else 'www'}.example.com/jobs/{fresh_uuid(r)}", "location"),
    Plant("header: x-valid-until an hour later", lambda r, t, bad: iso(t + HOUR * (1 + bad)), "x-valid-until"),
    Plant("header: x-ratelimit-limit", lambda r, t, bad: "10" if bad else "100", "x-ratelimit-limit"),
    Plant("header: x-amz-meta-*", lambda r, t, bad: f"{r.choice(WORDS)};owner={'none' if bad else 'shop'}", "x-amz-meta-origin"),
    Plant("cookie: undefined", lambda r, t, bad: f"sid={'undefined' if bad else fresh_token(r)}; Path=/", "set-cookie"),
    Plant("cookie: without signature", lambda r, t, bad: f"sid={fresh_token(r)}{'' if bad else '.' + fresh_token(r)}; Path=/", "set-cookie"),
    Plant("cookie: expires in ten years", lambda r, t, bad: f"sid={fresh_token(r)}; Expires={http_date(t + (3650 * DAY if bad else HOUR))}; Path=/", "set-cookie"),
    Plant("cookie: max-age ten years", lambda r, t, bad: f"sid={fresh_token(r)}; Max-Age={315_360_000 if bad else 3600}; Path=/", "set-cookie"),
)  # fmt: skip
CONTENT_TYPES = {"html": "text/html; charset=utf-8", "csv": "text/csv", "text": "text/plain"}
REDACTOR = Redactor("bench")  # as in the exporter of a service
READABLE_NAMES: set[str] = set()  # names that it does not redact


def answer(plants: Sequence[Plant], dice: Dice, now: float, *, bad: bool) -> Answer:
    """Return the response of a service with these values. All plants have one format, except headers."""
    headers: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    page = content_type = ""
    for plant in plants:
        value = plant.value(dice, now, bad)
        if plant.format == "json":
            values[f"value{len(values) or ''}"] = value
        elif plant.format in CONTENT_TYPES:
            content_type, page = CONTENT_TYPES[plant.format], page + value
        else:
            headers.append((plant.format, value))
    if not content_type:
        fields = {"request_id": fresh_uuid(dice), "generated_at": iso(now), **values, "name": "constant"}
        content_type, content = "application/json", orjson.dumps(fields)
    elif content_type.startswith("text/html"):
        content = f"<html><body><i data-id='{fresh_uuid(dice)}'></i>{page}</body></html>".encode()
    else:
        content = page.encode()
    body = Body(content, len(content))
    all_headers = (("content-type", content_type), *headers)
    allowed = frozenset(READABLE_NAMES)
    redacted = REDACTOR.redact_body(body, content_type, allowed=allowed)
    return Answer(200, REDACTOR.redact_headers(all_headers, allowed), redacted)


def capture_pair(
    plants: Sequence[Plant], number: int, dice: Dice, *, share: float, weight: float, broken: bool
) -> list[Capture]:
    """Return the captures of one request: the live response, and one or two copies in random order."""
    live: Version = "new" if dice.random() < weight else "old"
    slots: list[tuple[Version, Role]] = [("old" if live == "new" else "new", "shadow")]
    if dice.random() < share:
        slots.insert(dice.randrange(2), (live, "baseline"))
    started = START + number / PAIRS_PER_S
    captures = []
    for version, role in ((live, "live"), *slots):
        duration = dice.uniform(0.002, 0.02)
        request = Request("GET", "/page", "", "/page", (("cookie", f"user={number}"), ("host", "www.example.com")))
        content = answer(plants, dice, started + duration / 2, bad=broken and version == "new")
        captures.append(
            Capture(
                f"p{number}", plants[0].name, version, role, request, content, expected_captures=1 + len(slots),
                release=f"{version}-1", started_at=started, total_us=int(1e6 * duration), wait_us=300, in_flight=0,
            )
        )  # fmt: skip
        started += duration
    return captures


@dataclass
class Run:
    service: str
    ever_real: dict[str, int]  # finding → pairs until it was real
    final: list[str]


class Bench:
    """A ledger that is filled with one service after another."""

    def __init__(self, server: PostgresServer) -> None:
        self.url = server.url()
        self.writer = PairWriter(self.url, examples_per_finding=1)
        self.database = Database(self.url)

    async def run(self, service: str, pairs: Iterator[list[Capture]]) -> Run:
        result, count, options = Run(service, {}, []), 0, CompareOptions()
        while batch := [
            record
            for _, record in zip(
                range(BATCH), (self._compare(service, captures, options) for captures in pairs), strict=False
            )
        ]:
            count += len(batch)
            await self.writer.write(batch)
            async with self.database.connection() as connection:
                await classify_findings(connection)
            findings = (
                await LedgerReader(self.database).list_findings(
                    FindingFilter(service=service, include_noise=True), PageRequest(1000)
                )
            ).rows
            result.final = [f"{item.part} {item.path} {item.kind}: {item.state}, {item.reason}" for item in findings]
            for item in findings:
                if item.state == "real":
                    result.ever_real.setdefault(f"{item.part} {item.path} {item.kind}: {item.reason}", count)
        return result

    def _compare(self, service: str, captures: Sequence[Capture], options: CompareOptions) -> PairRecord:
        moment = int(captures[0].started_at * 1000)
        pair = f"{service}-{captures[0].pair}"
        return PairRecord(service, f"{moment}-0", moment, pair, compare_pair(captures, options), ())


def stream(
    plants: Sequence[Plant], pairs: int, seed: str, *, share: float, weight: float, broken: bool
) -> Iterator[list[Capture]]:
    dice = random.Random(seed)
    for number in range(pairs):
        yield capture_pair(plants, number, dice, share=share, weight=weight, broken=broken)


def select_clean(number: int) -> list[Plant]:
    """Return the values of a clean run: several fields of one format, or one page."""
    groups = [[plant for plant in PLANTS if plant.format == "json"][part::8] for part in range(8)]
    groups += [[plant] for plant in PLANTS if plant.format in CONTENT_TYPES]
    groups += [[plant for plant in PLANTS if plant.format not in {"json", *CONTENT_TYPES, "set-cookie"}]]
    groups += [[plant] for plant in PLANTS if plant.format == "set-cookie"]
    return groups[number % len(groups)]


async def measure(server: PostgresServer, arguments: argparse.Namespace) -> int:
    await migrate(server.url())
    bench = Bench(server)
    await bench.database.open()
    plants = [plant for plant in PLANTS if arguments.only in plant.name]
    outcomes: dict[str, list[str]] = {"found": [], "missed": [], "not found, impossible in principle": []}
    for index, plant in enumerate(plants):
        pairs = stream(
            [plant], arguments.pairs, plant.name, share=arguments.share, weight=NEW_WEIGHT * (index % 2), broken=True
        )
        run = await bench.run(plant.name, pairs)
        outcome = (
            "found" if run.ever_real else "not found, impossible in principle" if plant.is_inseparable else "missed"
        )
        outcomes[outcome].append(plant.name)
        details = [f"after {at:,}: {text}" for text, at in run.ever_real.items()] or run.final
        print(f"{outcome:9.9} {plant.name}", *(details if arguments.verbose else ()), sep="\n      ", flush=True)
    false = 0
    for number in range(arguments.clean):
        service = f"clean {number}"
        pairs = stream(
            select_clean(number),
            arguments.pairs,
            service,
            share=arguments.share,
            weight=NEW_WEIGHT * (number % 2),
            broken=False,
        )
        run = await bench.run(service, pairs)
        false += bool(run.ever_real)
        for text, at in run.ever_real.items():
            print(f"false finding in run {number} after {at:,}: {text}", flush=True)
    await bench.writer.close()
    await bench.database.close()
    for outcome, names in outcomes.items():
        print(f"{outcome}: {len(names)} of {len(plants)}")
    print(f"false findings: in {false} of {arguments.clean} clean runs")
    return int(false > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=400, help="pairs of each run")
    parser.add_argument("--share", type=float, default=0.75, help="share of pairs with a second copy")
    parser.add_argument("--clean", type=int, default=60, help="clean runs")
    parser.add_argument("--only", default="", help="plants with this text in their names")
    parser.add_argument(
        "--unredacted", action="store_true", help="leave secrets readable, as ABREAST_REDACT_ALLOW does"
    )
    parser.add_argument("--verbose", action="store_true", help="print the findings of each plant")
    arguments = parser.parse_args()
    if arguments.unredacted:
        READABLE_NAMES.add(EVERYTHING)
    began = time.monotonic()
    server = PostgresServer()
    server.start()
    try:
        return asyncio.run(measure(server, arguments))
    finally:
        server.stop()
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
