from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.settings import format_value
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress, StickyKey, parse_addresses, parse_sticky
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import Settings

DOCS = Path(__file__).parents[2] / "docs" / "envoy.md"
ROW = re.compile(r"^\| `ABREAST_(\w+)` \| (.*?) \| (.+) \|$", re.MULTILINE)


def read(**variables: str) -> EnvoySettings:
    return EnvoySettings.from_environment({f"ABREAST_{name.upper()}": value for name, value in variables.items()})


def test_default_addresses_are_loopback() -> None:
    settings = EnvoySettings()

    assert {settings.listen.host, settings.admin.host} == {"127.0.0.1"}


def test_default_mirrors_no_unsafe_requests() -> None:
    assert EnvoySettings().sample_unsafe == 0


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("old", "10.0.0.7:8000", (SocketAddress("10.0.0.7", 8000),)),
        ("old", "a.internal:80, b_2:81", (SocketAddress("a.internal", 80), SocketAddress("b_2", 81))),
        ("new", "[::1]:8000,[fd00::7]:81", (SocketAddress("::1", 8000), SocketAddress("fd00::7", 81))),
        ("new", "http://127.0.0.1:8002/", (SocketAddress("127.0.0.1", 8002),)),
        ("listen", ":8080", SocketAddress("0.0.0.0", 8080)),
        ("listen", "[::]:8080", SocketAddress("::", 8080)),
        ("health_path", "tcp", "tcp"),
        ("per_try_timeout", "0", 0.0),
        ("per_try_timeout", "0.25", 0.25),
        ("sample_safe", "2.5%", 0.025),
        ("sticky", "header:X-User", StickyKey("header", "x-user")),
        ("sticky", "cookie:Session", StickyKey("cookie", "Session")),
        ("sticky", "source-ip", StickyKey("source-ip")),
        ("sticky", "", StickyKey()),
        ("access_log", "yes", True),
        ("mirror_body_limit", "1000", 1000),
    ],
)
def test_variable_is_parsed(variable: str, value: str, expected: Any) -> None:
    assert getattr(read(**{variable: value}), variable) == expected


@given(st.ip_addresses(), st.integers(1, 65535), st.sampled_from(["header:x-user", "cookie:User", "source-ip"]))
def test_formatted_value_parses_to_the_same_value(address: IPv4Address | IPv6Address, port: int, key: str) -> None:
    host = str(address)
    if "%" not in host:
        endpoint = SocketAddress(host, port)
        assert parse_addresses(format_value((endpoint, endpoint))) == (endpoint, endpoint)
    assert format_value(parse_sticky(key)) == key


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *[
            ("old", value)
            for value in ("a", "a:", ":80", "a:0", "a:70000", "a b:80", "::1:80", "[a]:80", "a:80\nx:1", ",")
        ],
        *[("old", value) for value in ("https://a:443", "a:80/path", 'a":80', "-a:80", "[::1%eth0]:80", "a:٣")],
        *[("listen", value) for value in ("localhost:8080", "8080", "1.2.3.4", "1.2.3.4:x")],
        *[("sidecar", value) for value in ("a,b:1", "a")],
        *[("health_path", value) for value in ("healthz", "/a b", "/a\nb")],
        *[("connect_timeout", value) for value in ("0", "-1", "30s", "nan", "inf", "1e9", "0.0001")],
        *[("per_try_timeout", value) for value in ("-1", "5s")],
        *[("sticky", value) for value in ("header", "header:", "header:a b", 'cookie:a"', "ip", "source-ip:x")],
        *[("service", value) for value in ("a\nb", "a b", "{a}", "a/b")],
        *[("node_id", value) for value in ("a\nb", "\x00")],
        *[("mirror_body_limit", value) for value in ("0", "-1", "1.5", "5000000000")],
        *[("sample_safe", value) for value in ("2", "-1%", "x")],
        ("old_tls", "a b"),
        ("access_log", "maybe"),
    ],
)
def test_invalid_value_is_rejected_with_the_name_of_its_variable(variable: str, value: str) -> None:
    name = f"ABREAST_{variable.upper()}"
    with pytest.raises(SettingError, match=f"^{name} must be .*, got ") as error:
        read(**{variable: value})

    assert repr(value) in str(error.value)


def test_invalid_secret_is_not_shown() -> None:
    with pytest.raises(SettingError, match="ABREAST_TESTER_SECRET must be 16 to 200") as error:
        read(tester_secret="hunter2")

    assert "hunter2" not in str(error.value)
    assert "hunter2" not in repr(EnvoySettings(tester_secret="hunter2"))


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key"])
def test_certificate_and_key_must_be_set_together(name: str) -> None:
    with pytest.raises(SettingError, match="go together"):
        read(**{name: "/etc/tls/file.pem"})


def test_listener_and_admin_must_not_share_an_address() -> None:
    with pytest.raises(SettingError, match="must differ"):
        read(listen="127.0.0.1:9901")


def test_settings_shared_with_the_sidecar_have_the_same_default_and_parser() -> None:
    """Envoy and the sidecar read the initial shares from the same variables."""
    envoy = {setting.name: (setting.default, setting.parse) for setting in EnvoySettings.declared()}
    sidecar = {setting.name: (setting.default, setting.parse) for setting in Settings.declared()}
    shared = envoy.keys() & sidecar.keys()

    assert shared == {"sample_safe", "sample_unsafe", "baseline_share"}
    assert all(envoy[name] == sidecar[name] for name in shared)


def test_docs_list_every_setting_with_its_default() -> None:
    rows = {name: (default, doc) for name, default, doc in ROW.findall(DOCS.read_text())}

    assert rows == {
        setting.variable.removeprefix("ABREAST_"): (
            f"`{setting.default_text}`" if setting.default_text else "",
            setting.doc,
        )
        for setting in EnvoySettings.declared()
    }


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"per_try_timeout": "5", "request_timeout": "5"},
            "ABREAST_PER_TRY_TIMEOUT must be below ABREAST_REQUEST_TIMEOUT.*got 5 and 5 seconds",
        ),
        (
            {"per_try_timeout": "5", "idle_timeout": "2"},
            "ABREAST_PER_TRY_TIMEOUT must be below ABREAST_IDLE_TIMEOUT.*got 5 and 2 seconds",
        ),
    ],
)
def test_contradicting_timeouts_are_refused_with_both_values(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read(**variables)


def test_keepalive_above_that_of_common_servers_is_a_warning() -> None:
    assert read().list_warnings() == []
    [warning] = read(old_keepalive="2.5").list_warnings()
    assert "ABREAST_OLD_KEEPALIVE is 2.5 seconds" in warning
    assert "gunicorn after 2" in warning
    assert "uvicorn" not in warning
