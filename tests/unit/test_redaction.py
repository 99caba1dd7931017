from __future__ import annotations

import base64
import datetime as dt
import gzip
import hashlib
import itertools
import json
import random
import re
import string
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_plus

import brotli  # type: ignore[import-untyped]  # it has no types
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from abreast.export import redaction
from abreast.export.redaction import ALL_KINDS, SECRET_HEADERS, Redactor, is_card_number, is_random_token
from abreast.export.serializer import RotatingRedactor
from abreast.protocol.capture import Body, Headers
from abreast.settings import Settings
from abreast_sidecar.compare.content import decode_content
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from support_corpus import describe_differences, pairs

KEY = "a key"
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters=";="), min_size=8)


def redact(name: str, value: str, key: str = KEY) -> str:
    ((_, redacted),) = Redactor(key, ["x-own"]).redact_headers(((name, value),))
    return redacted


@pytest.mark.parametrize("name", [*sorted(SECRET_HEADERS), "x-own"])
def test_secret_header_is_hashed(name: str) -> None:
    assert "hunter2-hunter2" not in redact(name, "hunter2-hunter2")
    assert "hmac:" in redact(name, "hunter2-hunter2")


@given(TEXT, TEXT)
def test_equal_secrets_have_equal_hashes(first: str, second: str) -> None:
    assert (redact("authorization", first) == redact("authorization", second)) == (first == second)


@given(TEXT)
def test_hash_depends_on_the_key(value: str) -> None:
    assert redact("authorization", value) != redact("authorization", value, "another key")


def test_hash_has_16_hex_digits() -> None:
    mark, key_id, digits = redact("authorization", "Bearer abc").split(":")

    assert (mark, len(key_id), len(digits)) == ("hmac", 8, 32)
    int(digits, 16)


def test_set_cookie_keeps_its_name_and_attributes() -> None:
    redacted = redact("set-cookie", "session=hunter2; Path=/; Max-Age=60; HttpOnly")

    assert redacted.startswith("session=hmac:")
    assert redacted.endswith("; Path=/; Max-Age=60; HttpOnly")
    assert "hunter2" not in redacted


@pytest.mark.parametrize("value", ["", "undefined", "null", '"None"', "[object Object]"])
def test_set_cookie_keeps_placeholder(value: str) -> None:
    assert redact("set-cookie", f"session={value}; Path=/") == f"session={value}; Path=/"


def test_set_cookie_hashes_signature_separately() -> None:
    redacted = redact("set-cookie", f"session=s%3Ahunter2.{TOKEN}; Path=/")
    value, _, signature = redacted.removeprefix("session=").removesuffix("; Path=/").partition(".")

    assert value == redact("x-own", "s%3Ahunter2")
    assert signature == redact("x-own", TOKEN)
    assert redact("set-cookie", "session=hunter.2").count("hmac:") == 1


def test_cookie_keeps_only_its_name() -> None:
    redacted = redact("cookie", "a=hunter2; b=hunter3=; naked")

    assert redacted.startswith("a=hmac:")
    assert "; b=hmac:" in redacted.replace(";  ", "; ")
    assert not any(secret in redacted for secret in ("hunter2", "hunter3", "naked"))


def test_other_headers_are_unchanged() -> None:
    headers = (("content-type", "text/html"), ("x-request-id", "7"), ("access-control-allow-credentials", "true"))

    assert Redactor(KEY).redact_headers(headers) == headers


def test_key_may_have_any_length() -> None:
    assert redact("authorization", "x" * 8, "k" * 1000) != redact("authorization", "x" * 8, "k" * 999)


REDACTOR = Redactor(KEY)
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.s5cGxxkR0cKZ"
CARD = "4111 1111 1111 1111"
TOKEN = "xk9Lm2Qw8Zr5Tb1Vn7Yc4"
UUID = "7b0bbbd0-8d3c-4a53-9d3d-6f8f5a5c5f7b"
DIGEST = "5d41402abc4b2a76b9719d911017c592"


def redact_body(content: str | bytes, content_type: str = "application/json", redactor: Redactor = REDACTOR) -> str:
    raw = content.encode() if isinstance(content, str) else content
    return redactor.redact_body(Body(raw, len(raw)), content_type).content.decode()


@pytest.mark.parametrize(
    ("content", "content_type", "secret"),
    [
        ('{"a": [{"newPassword": "hunter2"}]}', "application/json", "hunter2"),
        ('{"pin" : 4711}', "application/json", "4711"),
        ('{"token": {"value": "hunter2"}, "b": 1}', "application/json", "hunter2"),
        ('{"p\\u0061ssword": "hunter2"}', "application/json", "hunter2"),
        ('{"token": "hunter2', "application/json", "hunter2"),
        ('{"a": 1}\n{"secret": "hunter2"}\n', "application/x-ndjson", "hunter2"),
        (json.dumps({"a": json.dumps({"b": json.dumps({"token": "hunter2"})})}), "application/json", "hunter2"),
        (json.dumps({"a": base64.b64encode(b'{"token": "hunter2"}').decode()}), "application/json", "eyJ0b2tlbiI6"),
        (json.dumps({"a": f"see {JWT} there"}), "application/json", JWT),
        (json.dumps({"a": CARD, "n": 4111111111111111}), "application/json", "1111"),
        (json.dumps({TOKEN: 1, "b": TOKEN}), "application/json", TOKEN),
        ('{"next": "https://me:hunter2@host/?api_key=hunter2"}', "application/json", "hunter2"),
        ('{"error": "login failed: password: hunter2"}', "application/json", "hunter2"),
        ('data: {"token": "hunter2"}\n\n', "text/event-stream", "hunter2"),
        ("a=1&user[password]=hunter%32&b=2", "application/x-www-form-urlencoded", "hunter"),
        ("<input name='csrf_token' value='hunter2'>", "text/html", "hunter2"),
        ("<a><Password>hunter2</Password></a>", "application/xml", "hunter2"),
        ("<a><b id='1' token='hunter2'/></a>", "application/xml", "hunter2"),
        ("<a><Password>\n<![CDATA[hunter2]]></Password></a>", "application/xml", "hunter2"),
        ("--b\nContent-Disposition: form-data; name=password\n\nhunter2\n--b--", "multipart/form-data; boundary=b", "hunter2"),
        (f"--b\r\nContent-Disposition: form-data; filename*=UTF-8''{TOKEN}.png\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b", TOKEN),
        ("<p>Api key: <TEXTAREA rows=2 NAME='api_key'>\nhunter2 </TEXTAREA></p>", "text/html", "hunter2"),
        ("<INPUT TYPE=HIDDEN NAME=csrf_token VALUE=hunter2>", "text/html", "hunter2"),
        ("<input type=password value='hunter2'><input id=token value=hunter2>", "text/html", "hunter2"),
        ('{"a": "<textarea name=\\"secret\\">hunter2</textarea>"}', "application/json", "hunter2"),
        ("DB_PASSWORD=hunter2 is wrong", "text/plain", "hunter2"),
        ("try curl -s -u ann:hunter2 https://a.example/", "text/plain", "hunter2"),
        ("curl --user 'ann:hunter2' https://a.example/", "text/plain", "hunter2"),
        ('{"a": "curl -uann:hunter2 x, or //ann:hunter2@a.example/b"}', "application/json", "hunter2"),
        ('<a href="//ann:hunter2@a.example/b">', "text/html", "hunter2"),
        ("//ann:hunter2@10.0.0.1/b or //ann:hunter2@10-0-0-1.a.example", "text/plain", "hunter2"),
        ("redis://:hunter2@1.2.3", "text/plain", "hunter2"),
        ("curl -H 'X-Api-Key: hunter2' -u ann:hunter2 https://a.example/", "text/plain", "hunter2"),
        ("the_long_name_of_a_PASSWORD=hunter2", "text/plain", "hunter2"),
        (f"session {TOKEN}: expired, and 9{TOKEN}= too", "text/plain", TOKEN),
        ("Authorization: Bearer hunter2hunter2", "text/plain", "hunter2hunter2"),
        ("-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----", "text/plain", "hunter2"),
    ],
)  # fmt: skip
def test_secret_in_a_body_is_hashed_and_stays_comparable(content: str, content_type: str, secret: str) -> None:
    redacted = redact_body(content, content_type)
    other = content.replace("hunter2", "hunter3").replace(JWT, JWT[:-4] + "AAAA")

    assert secret not in redacted
    assert redacted == redact_body(content, content_type)
    assert redacted.count("hmac:") >= 1
    if other != content:
        assert redact_body(other, content_type) != redacted


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (json.dumps({"id": 17, "uuid": UUID, "etag": DIGEST, "at": 1733000000123, "ns": 1733000000123456789}), "application/json"),
        ('{"price": 1.0, "big": 12345678901234567890123, "a": 1, "a": 1e5, "token": null, "has_password": true}', "application/json"),
        ('{"usage": {"prompt_tokens": 12, "completion_tokens": 30, "total_tokens": 42}, "max_tokens": 100}', "application/json"),
        ('{"next_page_token": "abc", "token_type": "bearer", "author": "x", "keyboard": "y", "shipping": "z"}', "application/json"),
        (json.dumps({"cursor": base64.b64encode(b'{"id": 1234567, "page": 2}').decode()}), "application/json"),
        ("<p class='card'>Your basket: 2 items, getUserByIdForCustomerName</p>", "text/html"),
        ("q=shoes&page=2&sort=price", "application/x-www-form-urlencoded"),
    ],
)  # fmt: skip
def test_evidence_stays_byte_for_byte(content: str, content_type: str) -> None:
    assert redact_body(content, content_type) == content


def test_secret_beside_a_lone_surrogate_is_hashed() -> None:
    assert redact_body(f'{{"a": "\\ud800 {TOKEN}"}}') == f'{{"a": "\\ud800 {REDACTOR.hash(TOKEN)}"}}'


def test_rest_of_a_json_body_stays_byte_for_byte() -> None:
    redacted = redact_body('{"price": 1.0,  "password":"x", "a": 1, "a": 12345678901234567890123}')

    assert redacted == f'{{"price": 1.0,  "password":"{REDACTOR.hash("x")}", "a": 1, "a": 12345678901234567890123}}'


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ('{"pin":1234}', '{"pin":"1234"}'),
        ('{"otp":[1]}', '{"otp":"[1]"}'),
        ('{"n":4111111111111111}', '{"n":"4111111111111111"}'),
    ],
)
def test_secret_number_differs_from_its_text(number: str, text: str) -> None:
    assert not re.search("1234|4111", redact_body(number) + redact_body(text))
    assert redact_body(number).replace('"', "") != redact_body(text).replace('"', "")


def test_card_number_has_one_hash_in_bodies_and_payloads() -> None:
    number = 4111111111111111

    assert json.loads(redact_body(json.dumps({"n": number}))) == REDACTOR.redact_payload({"n": number})


@pytest.mark.parametrize(
    "text", ["23104023-3058-4094-a790-e76771a19b1b", "at /orders/23104023-3058-4094-a790-e76771a19b1b?page=2"]
)
def test_uuid_with_the_digits_of_a_card_number_stays_readable(text: str) -> None:
    assert is_card_number(re.sub("[^0-9]", "", re.findall(r"[0-9-]{18}", text)[0]))
    assert REDACTOR.redact_text(text) == text
    assert json.loads(redact_body(json.dumps({"id": text}))) == {"id": text}
    assert REDACTOR.redact_payload({"id": text}) == {"id": text}


@pytest.mark.parametrize(
    "text",
    [
        "{card} 1",
        "{card} 12/29",
        "{card} 123",
        "1234 {card}",
        "12 {card} 12/29 123",
        "on 2026-11-30, {card}.",
        "{card}-1",
    ],
)
@pytest.mark.parametrize(
    "card",
    [
        "4111111111111111",
        CARD,
        CARD.replace(" ", "-"),
        "4111 1111-1111 1111",
        "4111.1111.1111.1111",
        "3782-822463 10005",
        "3782 822463 10005",
        "6212 3412 3412 3412 346",
        "621234 1234123412346",
    ],
)
def test_card_number_beside_other_digits_is_hashed(text: str, card: str) -> None:
    assert is_card_number(re.sub("[ .-]", "", card))
    redacted = REDACTOR.redact_text(text.format(card=card))

    assert redacted == text.format(card=REDACTOR.hash(card))
    assert json.loads(redact_body(json.dumps({"id": text.format(card=card)}))) == {"id": redacted}


@pytest.mark.parametrize(
    ("text", "login"),
    [
        ("curl -u {} x", "ann:hunter2"),
        ("curl -uuser:pw x", "user:pw"),
        ("curl -u{} x", "user:pw"),
        ("curl -su {} x", "user:pw"),
        ("curl -sSLku '{}' x", "user:pw"),
        ("curl -s -Uuser:pw x", "user:pw"),
        ("curl --proxy-user={} x", "user:pw"),
        ('curl --user "{}" x', "user:pw"),
    ],
)
def test_login_of_curl_is_hashed_whole(text: str, login: str) -> None:
    text = text.replace("user:pw", "{}")

    assert REDACTOR.redact_text(text.format(login)) == text.format(REDACTOR.hash(login))


@pytest.mark.parametrize(
    "text",
    [
        "curl -Fupload=@a:b",
        "curl -Fu=c:d",
        "curl -ofu:b x",
        "docker run -u 10:10 curl x",
        "-u 10:10",
        "//registry:foo@1.2.3",
        '"//cdn.com:pkg@1.2.3"',
        "//cdn.com:pkg@v1.2.3-beta.1",
        "//cdn.com:pkg@2",
        "https://a.example//b:c@d.example",
    ],
)
def test_text_that_resembles_a_login_stays_readable(text: str) -> None:
    assert REDACTOR.redact_text(text) == text
    assert json.loads(redact_body(json.dumps({"a": text}))) == {"a": text}


@pytest.mark.parametrize(
    "text",
    [
        "123-4567890-1234567",
        "4111.1111 1111.1111",
        "4111 1111.1111 1111",
        "3782.822463 10005",
        "621234.1234123412346",
        "POINT(4539.1488 0343.6467)",
        "DE12 3456 7890 1234 5678 90",
        "+49 170 1234 5678 901",
        "10 20 30 40 50 60 70 80",
        "2026-11-30 12:34:56.123456",
    ],
)
def test_digits_in_other_groups_than_a_card_stay_readable(text: str) -> None:
    assert REDACTOR.redact_text(f"the {text} is there") == f"the {text} is there"


def test_coordinates_stay_readable() -> None:
    source = random.Random(1)
    points = [
        "POINT({:04}.{:04} {:04}.{:04})".format(*(source.randrange(10_000) for _ in range(4))) for _ in range(20_000)
    ]
    text = ", ".join(points)

    assert [REDACTOR.redact_text(point) for point in points] == points
    assert redact_body(text, "text/plain") == text


def test_long_json_number_stays_a_number() -> None:
    """An id of 18 digits has the check digit of a card number by chance. As a hash, it would have another type."""
    number = 4111111111111111110
    assert is_card_number(str(number))

    assert redact_body(f'{{"id": {number}}}') == f'{{"id": {number}}}'
    assert REDACTOR.redact_payload([number, -4111111111111111])[0] == number


@pytest.mark.parametrize("token", ["payment-of-card-4111-1111-1111-1111", "payment-of-the-card-4111 1111 1111 1111."])
@pytest.mark.parametrize("other", ["", " and the long token aB3dE5gH7jK9mN1pQ3sT5vW7"])
def test_card_number_at_the_end_of_a_long_word_is_hashed(token: str, other: str) -> None:
    redacted = REDACTOR.redact_text(token + other)

    assert "1111" not in redacted
    assert redacted.startswith("payment-of-")


def test_unreadable_body_keeps_length_and_keyed_digest() -> None:
    image = Body(b"\x89PNG\r\n\0hunter2", 15)
    redacted = REDACTOR.redact_body(image, "image/png")

    assert (redacted.content, redacted.length, redacted.digest) == (b"", 15, REDACTOR.hash(image.fingerprint()))
    assert REDACTOR.redact_body(image, "image/png", allowed=frozenset({"body"})) is image


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_compressed_body_is_redacted_and_stays_compressed(coding: str) -> None:
    compress = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstandard.compress}[
        coding
    ]
    packed, harmless = (compress(text) for text in (b'{"password": "hunter2"}', b'{"a": 1}'))
    redacted = REDACTOR.redact_body(Body(packed, len(packed)), "application/json", coding)

    text = decode_content(redacted.content, coding, 1000).data.decode()
    assert text == f'{{"password": "{REDACTOR.hash("hunter2")}"}}'
    assert redacted.length == len(redacted.content)
    assert REDACTOR.redact_body(Body(harmless, len(harmless)), "application/json", coding).content == harmless


def test_compressed_bomb_is_not_decoded() -> None:
    bomb = gzip.compress(bytes(50_000_000))

    assert REDACTOR.redact_body(Body(bomb, len(bomb)), "application/json", "gzip").content == b""


def test_body_of_an_unknown_coding_keeps_only_its_digest() -> None:
    assert REDACTOR.redact_body(Body(b"hunter2", 7), "text/plain", "own").content == b""


def test_multipart_names_and_contents_are_redacted() -> None:
    content = (
        f'--b\r\nContent-Disposition: form-data; name="password"\r\n\r\nhunter2\r\n--b\r\nContent-Disposition: form-data; '
        f'name="f"; filename="{TOKEN}.png"\r\nContent-Type: image/png\r\n\r\n\0hunter2\r\n--b--\r\n'
    )
    redacted = redact_body(content, "multipart/form-data; boundary=b")

    assert "hunter2" not in redacted
    assert TOKEN not in redacted
    assert 'name="password"' in redacted


def test_target_is_redacted() -> None:
    assert REDACTOR.redact_path(f"/reset/{TOKEN}/items/{UUID}") == f"/reset/{REDACTOR.hash(TOKEN)}/items/{UUID}"
    assert DIGEST not in REDACTOR.redact_path(f"/reset/{DIGEST}")
    assert REDACTOR.redact_query("token=a%20b&page=2") == f"token={REDACTOR.hash('a b')}&page=2"
    assert "4711" not in REDACTOR.redact_query("filter=%7B%22pin%22%3A%224711%22%7D")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("set-cookie", f"a=b; Path=/reset/{TOKEN}; HttpOnly"),
        ("set-cookie", "a=b; Path=/a?token=hunter2"),
        ("location", "https://a.example/cb#access_token=hunter2"),
        ("referer", "https://a.example/b?f=%7B%22password%22%3A%20%22hunter2%22%7D"),
        ("referer", f"https://a.example/b?x={JWT}"),
        ("grpc-message", "bad%20password%3A%20hunter2"),
        ("x-command", "tool --password=hunter2 --verbose"),
    ],
)
def test_secret_in_a_part_of_a_header_is_hashed(name: str, value: str) -> None:
    redacted = redact(name, value)

    assert not any(secret in redacted for secret in ("hunter2", TOKEN, JWT))
    assert redacted == redact(name, value)
    assert redacted != redact(
        name, value.replace("hunter2", "hunter3").replace(TOKEN, TOKEN[::-1]).replace(JWT, JWT[:-1])
    )


@pytest.mark.parametrize(
    "query", ["f=%257B%2522password%2522%253A%25201%257D", "r=%2Fx%3Fr%3D%252Fy%253Ftoken%253Dhunter2"]
)
def test_secret_below_two_percent_escapes_is_hashed(query: str) -> None:
    assert REDACTOR.redact_query(query).partition("=")[2] == REDACTOR.hash(unquote_plus(query.partition("=")[2]))


@pytest.mark.parametrize("value", ["100%", "50% off", "%E2%82%AC", "%25" * 5000, "/a?b=c%20d&e=%2Ff"])
def test_percent_escapes_without_a_secret_stay(value: str) -> None:
    assert redact("x-info", value) == value
    assert REDACTOR.redact_query(f"a={value}") == f"a={value}"


def test_allowed_name_stays_readable_at_its_endpoint_only() -> None:
    redactor = Redactor(KEY, allow=[("GET /login", "csrf_token")])
    content = b'{"csrf_token": "hunter2", "token": "hunter3"}'
    allowed, other = (
        redactor.redact_body(
            Body(content, len(content)), "application/json", allowed=redactor.allowed_names("GET", path)
        )
        for path in ("/login", "/other")
    )

    assert (b"hunter2" in allowed.content, b"hunter3" in allowed.content) == (True, False)
    assert b"hunter" not in other.content


@pytest.mark.parametrize("digits", ["4111111111111111", "5555555555554444", "378282246310005", "6011111111111117"])
def test_card_numbers_are_recognized(digits: str) -> None:
    assert is_card_number(digits)
    assert not is_card_number(digits[:-1] + str((int(digits[-1]) + 1) % 10))


@given(st.binary(min_size=24, max_size=48))
def test_uuid_and_digest_are_no_tokens(raw: bytes) -> None:
    assert not is_random_token(raw.hex())


@pytest.mark.parametrize(
    "text",
    [
        "MacBook-Pro-16-M3-Max-2024", "iPhone-15-Pro-Max-256GB-Blue", "Screenshot-2026-11-30-at-12-34-56", "LG-OLED65C47LA-AEU",
        "AppleWebKit/605-1-15-KHTML", "/assets/index-Ba1X9f3K", "Order-2026-11-30-A12345-Munich", "com/example/FooBar2Baz/V3",
        "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "USB-C-to-HDMI-4K-60Hz-Adapter", "Size-S-M-L-XL-XXL-3XL-4XL",
    ],
)  # fmt: skip
def test_words_and_numbers_with_gaps_are_no_token(text: str) -> None:
    assert not is_random_token(text)
    assert REDACTOR.redact_path(f"/a/{text}") == f"/a/{text}"
    assert redact_body(json.dumps({"slug": text})) == json.dumps({"slug": text})


@pytest.mark.parametrize(("groups", "chars"), [(3, 8), (4, 5), (5, 5)])
@pytest.mark.parametrize(
    ("alphabet", "share"),
    [(string.ascii_letters + string.digits, 0.95), (string.ascii_uppercase + string.digits, 0.75)],
)
def test_random_keys_with_gaps_are_tokens(groups: int, chars: int, alphabet: str, share: float) -> None:
    source = random.Random(1)
    keys = ["-".join("".join(source.choices(alphabet, k=chars)) for _ in range(groups)) for _ in range(2000)]

    assert sum(map(is_random_token, keys)) > share * len(keys)


def test_ordinary_values_stay_readable() -> None:
    """None of 20,000 ids, dates, prices, numbers of parts and other values of many kinds is hashed."""
    source = random.Random(1)

    def digits(*lengths: int) -> list[str]:
        return ["".join(source.choices(string.digits, k=length)) for length in lengths]

    makers: list[Callable[[], str]] = [
        lambda: str(uuid.UUID(int=source.getrandbits(128))),
        lambda: str(uuid.UUID(int=source.getrandbits(128))).upper(),
        lambda: hashlib.sha256(source.randbytes(4)).hexdigest(),
        lambda: "-".join(f"{source.getrandbits(32):08X}" for _ in range(4)),
        lambda: dt.datetime.fromtimestamp(source.random() * 2e9, dt.UTC).isoformat(),
        lambda: dt.datetime.fromtimestamp(source.random() * 2e9, dt.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"),
        lambda: f"{source.random() * 1e5:.2f} EUR",
        lambda: f"${source.randrange(10**9):,}.00",
        lambda: str(source.randrange(10**13)),
        lambda: repr(source.random() * 180),
        lambda: "+49 {} {}".format(*digits(3, 7)),
        lambda: ".".join(str(source.randrange(256)) for _ in range(4)),
        lambda: "{}-{}-{}".format(*digits(3, 7, 7)),
        lambda: "AB{}-CD{}-EF{}-GH{}".format(*digits(3, 3, 3, 3)),
        lambda: "PART{}-TYPE{}-LOT-{}".format(*digits(4, 4, 6)),
        lambda: "ann.{}@example.com:{}".format(*digits(4, 4)),
        lambda: "docker run -u {}:{} curl https://a.example/b?c={}#d".format(*digits(4, 4, 3)),
        lambda: "https://a.example:{}/@scope/pkg@1.{}.{}".format(*digits(4, 1, 2)),
        lambda: "<button id=b{} type=submit value={}>Buy</button><textarea name=note>{}</textarea>".format(*digits(2, 3, 4)),
        lambda: "<input type=hidden name=page value={}>".format(*digits(3)),
    ]  # fmt: skip
    for make in makers:
        for text in (make() for _ in range(1000)):
            assert REDACTOR.redact_text(text) == text
            assert redact("x-info", text) == text
            assert redact_body(json.dumps({"a": text})) == json.dumps({"a": text})


@pytest.mark.parametrize("name", ["host", "x-forwarded-host"])
def test_user_information_of_a_host_header_is_hashed(name: str) -> None:
    assert redact(name, "ann:hunter2@a.example:80") == f"{REDACTOR.hash('ann:hunter2')}@a.example:80"
    assert redact(name, "a.example:80") == "a.example:80"


@pytest.mark.parametrize("size", [16, 24, 32])
def test_random_bytes_in_base64_are_tokens(size: int) -> None:
    source = random.Random(1)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        tokens = [encode(source.randbytes(size)).decode() for _ in range(2000)]
        assert sum(map(is_random_token, tokens)) > 0.95 * len(tokens)


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "abcdefGHIJ" * 3, "shpat_" + "0a" * 16, "dop_v1_" + "0a" * 32, "dapi" + "0a" * 16, "github_pat_" + "a" * 40,
        "sk-proj-" + "a" * 40,
    ],
)  # fmt: skip
def test_tokens_of_known_issuers_are_hashed(token: str) -> None:
    assert REDACTOR.redact_text(f"a {token} b") == f"a {REDACTOR.hash(token)} b"
    assert REDACTOR.redact_text(token) == REDACTOR.hash(token)


@given(st.text(), st.sampled_from(["application/json", "text/html", "application/x-www-form-urlencoded", ""]))
def test_redaction_is_idempotent_in_its_hashes_and_never_fails(text: str, content_type: str) -> None:
    redact_body(text, content_type)
    REDACTOR.redact_path(text)
    REDACTOR.redact_query(text)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_redacted_json_stays_json(value: object) -> None:
    json.loads(redact_body(json.dumps({"token": value, "a": value})))


def test_corpus_keeps_its_differences() -> None:
    """Compare all labelled pairs before and after redaction of JSON and text."""
    for pair in pairs():
        sides = []
        for capture in (pair.old, pair.new):
            answer = capture.answer
            headers: Headers = REDACTOR.redact_headers(answer.headers)
            values = dict(answer.headers)
            body = REDACTOR.redact_body(answer.body, values.get("content-type", ""), values.get("content-encoding", ""))
            if answer.body.content and not body.content:  # compared by its digest, as documented
                break
            sides.append(replace(capture, answer=replace(answer, headers=headers, body=body)))
        else:
            after = describe_differences(compare_pair(sides, CompareOptions()))
            if pair.name != "a token without padding":  # its hash has no format
                assert after == describe_differences(pair.compare()), pair.name


@given(
    st.dictionaries(
        st.sampled_from(["id", "Api Key", "token", "password for user", "author", "p\\u0061ssword"]),
        st.sampled_from(
            [TOKEN, JWT, CARD, "a token=hunter2 b", "https://me:hunter2@h", '{"pin": "4711"}', "x: y", UUID]
        ),
    ),
    st.sampled_from([None, 2]),
    st.sampled_from([(",", ":"), (", ", " : ")]),
    st.integers(0, 40_000),
)
def test_inspection_misses_no_secret(
    value: dict[str, str], indent: int | None, separators: tuple[str, str], padding: int
) -> None:
    """A body has the same hashes whether it is inspected as a whole, in pieces, or without the inspection."""
    text = json.dumps({"padding": "ab " * (padding // 3), **value}, indent=indent, separators=separators)
    redacted = redact_body(text)

    assert redacted == REDACTOR._redact_json(text, ALL_KINDS)


def test_large_body_lets_the_loop_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread needs at most 20 ms of CPU time between two turns of the loop, also on a busy machine."""
    item = {"id": 1, "uuid": UUID, "url": "/a?b=1", "session_id": "hunter2", "text": "some words, and more of them"}
    content = json.dumps([item] * 2000).encode()
    times = [time.thread_time()]
    monkeypatch.setattr(redaction, "_let_loop_run", lambda: times.append(time.thread_time()))
    REDACTOR.redact_body(Body(content, len(content)), "application/json")

    assert len(times) > 20
    assert max(after - before for before, after in itertools.pairwise(times)) < 0.02


@pytest.mark.parametrize("digest", ["ab" * 16, "envoy:ab", "envoy:part:ab"])
def test_digest_is_hashed_and_keeps_the_mark_of_a_checksum(digest: str) -> None:
    body = Body(b"hunter", 1000, digest)
    redacted = REDACTOR.redact_body(body, "text/plain")

    assert REDACTOR.hash(digest) in redacted.digest
    assert redacted.digest.removesuffix(REDACTOR.hash(digest)) == digest.rpartition("ab")[0].replace("ab", "")


@pytest.mark.parametrize(
    "unit",
    [
        "curl ",
        "curl -u",
        " -u a",
        " -uuuuu:",
        "2026 4111 ",
        "4111.1111 ",
        "13.404953999999975,",
        "//a:b",
        "<textarea ",
        "1.",
        "AB12-",
        "a=",
        "<a ",
        "<input ",
        "://:",
        'a="',
        "1 ",
        "aB1/",
        "Bearer ",
        '{"token":',
        '"',
        '\\"',
        f"{TOKEN}!",
    ],
)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    def measure(count: int) -> float:
        start = time.process_time()
        for content_type in ("text/plain", "application/json"):
            redact_body(unit * count, content_type)
        return time.process_time() - start

    measure(100)
    assert measure(40_000) < 20 * measure(10_000) + 0.5


@pytest.mark.parametrize(
    ("start", "unit"),
    [("", "eyJ"), ("curl -", "u"), ("curl -", "sSuUkL"), ("curl -u", " "), ("curl -u a", "b"), ("curl --user ", "a")],
)
def test_text_that_begins_like_many_tokens_takes_linear_time(start: str, unit: str) -> None:
    def measure(count: int) -> float:
        text = start + unit * count
        start_s = time.process_time()
        redact_body(json.dumps({"q": text}), "application/json")
        redact_body(text, "text/plain")
        return time.process_time() - start_s

    measure(100)
    assert measure(80_000) < 20 * measure(10_000) + 0.5


@pytest.mark.parametrize(
    "form",
    ["{:.3f} ", "{:.6f} {:.6f}, ", "[{!r}, {!r}], ", "{:.0f} 2026 ", "L{:.2f}-{:.2f}"],
    ids=["decimals", "points", "long decimals", "years", "drawing"],
)
def test_numbers_are_inspected_about_as_fast_as_words(form: str) -> None:
    source = random.Random(1)
    numbers = "".join(form.format(source.uniform(1000, 2000), source.uniform(100, 999)) for _ in range(8000))
    words = "some words, and more of them " * (len(numbers) // 29)

    def measure(text: str) -> float:
        content, times = text.encode(), []
        for _ in range(7):
            start = time.process_time()
            assert not REDACTOR._inspect(content, is_json=False)
            times.append(time.process_time() - start)
        return min(times)

    assert measure(numbers) < 8 * measure(words)


@pytest.mark.parametrize("redactor", [Redactor(KEY), Redactor(KEY, ["x-key2"])])
def test_harmless_texts_hide_no_secret_of_the_same_form(redactor: Redactor) -> None:
    """Digits can make a secret of a text that is harmless with others, and the type of a body of the same bytes."""
    encoded, harmless = (base64.b64encode(text).decode() for text in (b'{"token":"hunter2"}', b'{"t0ken":"hunter2"}'))
    pairs_of_texts = [
        ("4111 1111 1111 1112", CARD),
        ("at 4111111111111112", "at 4111111111111111"),
        (harmless, encoded),
        ("a%71=b", "%70assword=b"),
        ("x-key1=hunter1", "x-key2=hunter2"),
    ]
    for first, second in pairs_of_texts:
        redactor.redact_headers((("x-a", first),))
        (row,) = redactor.redact_headers((("x-a", second),))
        assert (row[1] == second) == (second.startswith("x-key") and "x-key2" not in redactor.secret_headers)
    body = "a=1&%70assword=hunter2"
    assert redact_body(body, "application/x-thing", redactor) == body
    assert "hunter2" not in redact_body(body, "application/x-www-form-urlencoded", redactor)


def test_spaced_name_of_several_words_is_found() -> None:
    assert "4711" not in redact_body('{"card number" : "4711", "at": "10:30"}')


def test_key_rotates_at_the_time_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotatingRedactor, "REFRESH_INTERVAL_S", 0.0)
    file = tmp_path / "key"
    keys = ["a" * 32, "b" * 32, "c" * 32]
    file.write_text(keys[0])
    redactor = RotatingRedactor(Settings(service="shop", redact_key=keys[0], redact_key_file=str(file)))
    first = redactor.at(5)
    assert redactor.at(1e12) is first

    file.write_text(f"{keys[0]},{keys[1]}@1970-01-02T00:00:00Z\n")
    redactor.refresh()
    second = redactor.at(86_400)
    assert [redactor.at(86_399), second.key_id] == [first, Redactor(keys[1]).key_id]

    file.write_text(f"{keys[1]},{keys[2]}@1970-01-03T00:00:00Z\n")
    redactor.refresh()
    assert redactor.at(2 * 86_400 - 1) is second
    assert redactor.at(2 * 86_400).key_id == Redactor(keys[2]).key_id

    file.write_text("damaged")
    with pytest.raises(ValueError, match="22 to 200 letters"):
        redactor.refresh()
    assert redactor.at(2 * 86_400 - 1) is second
