from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from abreast import ParallelRunMiddleware, SettingError
from abreast.settings import Settings, SettingsKwargs

ENVOY_HEADERS = {
    "x-abreast-pair": "0d7c1e3a-0000-4000-8000-000000000001",
    "x-abreast-version": "new",
    "x-abreast-role": "live",
    "x-abreast-copies": "2",
}


async def app(*_: object) -> None:
    pass


def read(arguments: dict[str, Any] | None = None, /, **environment: str) -> Settings:
    return Settings.from_environment(environment, {"service": "shop", **(arguments or {})})


def test_settings_kwargs_has_every_setting() -> None:
    assert list(SettingsKwargs.__annotations__) == [setting.name for setting in Settings.declared()]


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("ABREAST_REDIS_URL", "rediss://r:1/0", "redis_url", "rediss://r:1/0"),
        ("ABREAST_RELEASE", "v1.2", "release", "v1.2"),
        ("ABREAST_ENABLED", "off", "enabled", False),
        ("ABREAST_BODY_LIMIT", "0", "body_limit", 0),
        ("ABREAST_REQUEST_HEADERS", "Accept, X-Own", "request_headers", ("accept", "x-own")),
        ("ABREAST_SECRET_HEADERS", "X-Own", "secret_headers", ("x-own",)),
        ("ABREAST_PAIR_TIMEOUT", "2.5", "pair_timeout", 2.5),
        ("ABREAST_SHARDS", "4", "shards", 4),
    ],
)
def test_variable_sets_the_value(variable: str, text: str, name: str, value: object) -> None:
    assert getattr(Settings.from_environment({"ABREAST_SERVICE": "shop", variable: text}), name) == value


def test_argument_overrides_the_variable() -> None:
    assert read({"body_limit": 1}, ABREAST_BODY_LIMIT="2").body_limit == 1


def test_empty_text_counts_as_not_set() -> None:
    assert read(ABREAST_BODY_LIMIT="").body_limit == 256 * 1024
    assert read({"release": ""}, ABREAST_RELEASE="v1").release == "v1"


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("ABREAST_PAIR_TIMEOUT", "30s", "ABREAST_PAIR_TIMEOUT must be a number of seconds above 0, .*, got '30s'"),
        ("ABREAST_PAIR_TIMEOUT", "nan", "ABREAST_PAIR_TIMEOUT must be a number of seconds"),
        ("ABREAST_BODY_LIMIT", "-1", "ABREAST_BODY_LIMIT must be a whole number of bytes, 0 or more, got '-1'"),
        ("ABREAST_SHARDS", "0", "ABREAST_SHARDS must be a whole number of shards, 1 or more, got '0'"),
        ("ABREAST_ENABLED", "perhaps", "ABREAST_ENABLED must be true or false, got 'perhaps'"),
        ("ABREAST_RELEASE", "a\r\nb", "ABREAST_RELEASE must be a label"),
        ("ABREAST_REQUEST_HEADERS", "a b", "ABREAST_REQUEST_HEADERS must be header names"),
    ],
)
def test_invalid_variable_is_named_with_its_requirement(variable: str, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings.from_environment({"ABREAST_SERVICE": "shop", variable: text})


@pytest.mark.parametrize("name", ["", "a/b", "{a}", "a b", "a" * 101, "a\n", 7])
def test_service_needs_a_valid_name(name: object) -> None:
    with pytest.raises(SettingError, match=r"service (name|must be a name)"):
        Settings.from_environment({}, {"service": name} if name else {})


def test_invalid_url_is_not_shown_because_it_may_contain_a_password() -> None:
    with pytest.raises(SettingError, match=r"redis_url must be a URL .*got a value that is not shown") as error:
        read({"redis_url": "http://user:hunter2@r"})

    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["redis://host:port", "redis://[::"])
def test_unreadable_url_is_rejected(url: str) -> None:
    with pytest.raises(SettingError, match="redis_url must be a URL"):
        read({"redis_url": url})


def test_secrets_are_not_in_the_representation() -> None:
    representation = repr(read({"redis_url": "redis://:hunter2@r", "redact_key": "hunter3" * 4}))

    assert "hunter" not in representation
    assert "service='shop'" in representation


def test_unknown_argument_is_rejected() -> None:
    with pytest.raises(SettingError, match="there is no setting 'servise'"):
        Settings.from_environment({}, {"servise": "shop"})


def test_middleware_reads_the_environment_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABREAST_SERVICE", "basket")

    assert ParallelRunMiddleware(app).settings.service == "basket"


@pytest.mark.parametrize(
    ("variables", "arguments", "problem"),
    [
        ({}, {}, "the middleware needs a service name; pass service='shop' or set ABREAST_SERVICE"),
        ({}, {"service": "shop", "servise": "shop"}, "there is no setting 'servise'"),
        ({"ABREAST_SHARDS": "x"}, {"service": "shop"}, "ABREAST_SHARDS must be a whole number"),
    ],
)
async def test_invalid_setting_disables_the_middleware_and_logs_an_error(
    variables: dict[str, str],
    arguments: dict[str, Any],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Starlette constructs its middleware at the first request, so an exception would be a 500."""
    monkeypatch.delenv("ABREAST_SERVICE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    service = Starlette(routes=[Route("/", lambda _: PlainTextResponse("fine"))])
    service.add_middleware(ParallelRunMiddleware, **arguments)
    transport = httpx.ASGITransport(service)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        response = await client.get("/", headers=ENVOY_HEADERS)

    assert (response.status_code, response.text) == (200, "fine")
    assert "x-abreast-pair" not in response.headers
    assert [record.levelname for record in caplog.records if problem in record.getMessage()] == ["ERROR"]


def test_disabled_middleware_needs_no_service_name() -> None:
    assert not Settings.from_environment({"ABREAST_ENABLED": "no"}).enabled


def test_join_limits_have_the_units_of_the_script() -> None:
    limits = read({"pair_timeout": 2.5, "redis_pairs": 7, "redis_bytes": 9}).join_limits

    assert (limits.wait_ms, limits.max_pairs, limits.max_bytes) == (2500, 7, 9)


def test_secret_setting_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef0123456789abcdef\n")
    settings = Settings.from_environment({"ABREAST_SERVICE": "shop", "ABREAST_REDACT_KEY_FILE": str(file)})

    assert settings.redact_key == "0123456789abcdef0123456789abcdef"


def test_missing_secret_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="ABREAST_REDACT_KEY_FILE must name a readable file"):
        Settings.from_environment({"ABREAST_SERVICE": "shop", "ABREAST_REDACT_KEY_FILE": str(tmp_path / "none")})


def test_redaction_key_has_128_bits_and_defaults_to_the_edge_key() -> None:
    with pytest.raises(SettingError, match="redact_key must be 22 to 200 letters"):
        read({"redact_key": "0123456789abcdef"})
    assert read({"edge_key": "k" * 32}).redaction_keys.key == "k" * 32
    assert not read({"edge_key": "0123456789abcdef"}).redaction_keys.key


def test_redaction_keys_have_a_time_during_a_rotation() -> None:
    settings = read({"redact_key": f"{'a' * 22},{'b' * 22}@1970-01-02T00:00:00Z"})

    assert settings.redaction_keys == ("a" * 22, "b" * 22, 86_400)
    for value in (f"{'a' * 22},{'b' * 22}", f"{'a' * 22},{'b' * 22}@1970-13-02T00:00:00Z", f"{'a' * 22}@1970"):
        with pytest.raises(SettingError, match="redact_key must be 22 to 200 letters"):
            read({"redact_key": value})


def test_redaction_key_of_a_file_does_not_replace_one_that_is_set(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("f" * 32)
    settings = Settings.from_environment({"ABREAST_SERVICE": "shop"}, {"redact_key_file": str(file)})
    direct = read({"redact_key": "d" * 32, "redact_key_file": str(file)})

    assert (settings.redact_key, settings.redact_key_file) == ("f" * 32, str(file))
    assert (direct.redact_key, direct.redact_key_file) == ("d" * 32, "")


def test_allow_list_names_endpoints() -> None:
    settings = read({"redact_allow": "GET /login csrf_token,GET /images/{id} body"})

    assert settings.redact_allow == (("GET /login", "csrf_token"), ("GET /images/{id}", "body"))
    with pytest.raises(SettingError, match="redact_allow must be method, route and name"):
        read({"redact_allow": "csrf_token"})
