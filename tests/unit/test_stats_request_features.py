"""The features of a request that are stored, and those that never are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.protocol.capture import Body, Request
from abreast_sidecar.stats.features import MAX_FEATURE_BODY_BYTES, MAX_NAMES, collect_request_features

JSON = (("content-type", "application/json"),)
FORM = (("content-type", "application/x-www-form-urlencoded"),)


def request(
    body: bytes = b"", headers: tuple[tuple[str, str], ...] = JSON, query: str = "", path: str = "/orders/7"
) -> Request:
    return Request("POST", path, query, "/orders/{id}", headers, Body(body, len(body)))


def test_features_are_named_by_part_and_path() -> None:
    result = collect_request_features(
        request(
            b'{"currency": "JPY", "items": [{"sku": "a"}, {"sku": "b"}], "gift": true}',
            (*JSON, ("accept-language", "de")),
            "page=2",
        ),
        "/orders/{id}",
    )

    assert result == {
        "query.page": ["2"],
        "path.id": ["7"],
        "header.accept-language": ["de"],
        "header.content-type": ["application/json"],
        "body.currency": ["JPY"],
        "body.items[*].sku": ["a", "b"],
        "body.gift": ["true"],
    }


def test_form_fields_are_features() -> None:
    result = collect_request_features(request(b"size=L&size=M&size=S&note=", FORM), "/orders/{id}")

    assert result["body.size[*]"] == ["L", "M", "S"]
    assert result["body.note"] == [""]


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "userPasswd",
        "pass",
        "access_token",
        "apiKey",
        "api-key",
        "client_secret",
        "authToken",
        "session_id",
        "card_number",
        "cvv",
        "iban",
        "user.pin",
    ],
)
def test_secret_values_are_not_kept(name: str) -> None:
    result = collect_request_features(
        request(json.dumps({name: "hunter2"}).encode(), query=f"{name}=hunter2"), "/orders/{id}"
    )

    assert result[f"body.{name}"] == result[f"query.{name}"] == []


@pytest.mark.parametrize("name", ["author", "discard", "spin", "passenger", "shipping"])
def test_names_similar_to_secrets_keep_their_values(name: str) -> None:
    result = collect_request_features(request(json.dumps({name: "x"}).encode()), "/orders/{id}")

    assert result[f"body.{name}"] == ["x"]


def test_hashes_long_values_and_proxy_headers_are_no_features() -> None:
    headers = (
        ("authorization", "hmac:0011223344556677"),
        ("cookie", "variant=hmac:0011223344556677; theme=hmac:8899aabbccddeeff"),
        ("x-request-id", "7"),
        ("user-agent", "x" * 500),
    )

    assert collect_request_features(request(headers=headers, path="/orders"), "/orders") == {
        "header.authorization": [],
        "header.user-agent": [],
        "cookie.variant": [],
        "cookie.theme": [],
    }


def test_features_are_bounded() -> None:
    wide = json.dumps({f"f{n}": n for n in range(1000)}).encode()
    long = json.dumps({"text": "x" * MAX_FEATURE_BODY_BYTES}).encode()

    assert len(collect_request_features(request(wide), "/orders/{id}")) == MAX_NAMES
    assert not any(name.startswith("body") for name in collect_request_features(request(long), "/orders/{id}"))


@given(st.binary(max_size=200), st.sampled_from([JSON, FORM, ()]), st.text(max_size=40))
def test_features_accept_any_request(body: bytes, headers: tuple[tuple[str, str], ...], query: str) -> None:
    result = collect_request_features(request(body, headers, query), "/orders/{id}")

    assert all(isinstance(value, str) for values in result.values() for value in values)
