from __future__ import annotations

import dataclasses
import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.envoy.settings import (
    EnvoySettings,
    SocketAddress,
    StickyKey,
    parse_addresses,
    parse_sticky,
    to_env_value,
)
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import Settings

DOCS = Path(__file__).parents[2] / "docs" / "envoy.md"
ROW = re.compile(r"^\| `ABREAST_(\w+)` \| (.*?) \| (.+) \|$", re.MULTILINE)


def read(**variables: str) -> EnvoySettings:
    return EnvoySettings.from_environment({f"ABREAST_{name.upper()}": value for name, value in variables.items()})


def test_everything_listens_on_loopback_by_default() -> None:
    settings = EnvoySettings()

    assert {settings.listen.host, settings.admin.host} == {"127.0.0.1"}


def test_nothing_unsafe_is_mirrored_by_default() -> None:
    assert EnvoySettings().sample_unsafe == 0


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
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
def test_values_are_read_from_variables(variable: str, value: str, wanted: Any) -> None:
    assert getattr(read(**{variable: value}), variable) == wanted


@given(st.ip_addresses(), st.integers(1, 65535), st.sampled_from(["header:x-user", "cookie:User", "source-ip"]))
def test_what_is_written_is_read_back(address: IPv4Address | IPv6Address, port: int, key: str) -> None:
    host = str(address)
    if "%" not in host:
        there = SocketAddress(host, port)
        assert parse_addresses(to_env_value((there, there))) == (there, there)
    assert to_env_value(parse_sticky(key)) == key


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
def test_a_bad_value_is_refused_by_the_name_of_its_variable(variable: str, value: str) -> None:
    name = f"ABREAST_{variable.upper()}"
    with pytest.raises(SettingError, match=f"^{name} must be .*, got ") as raised:
        read(**{variable: value})

    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("half", ["tls_certificate", "tls_key"])
def test_half_of_a_certificate_is_refused(half: str) -> None:
    with pytest.raises(SettingError, match="go together"):
        read(**{half: "/etc/tls/file.pem"})


def test_the_listener_and_the_admin_interface_may_not_share_an_address() -> None:
    with pytest.raises(SettingError, match="must differ"):
        read(listen="127.0.0.1:9901")


def test_what_the_sidecar_has_a_setting_for_too_means_the_same() -> None:
    """Envoy's first values are the sidecar's first values, from one variable."""
    ours = {part.name: part for part in dataclasses.fields(EnvoySettings)}
    theirs = {part.name: part for part in dataclasses.fields(Settings)}
    shared = ours.keys() & theirs.keys()

    assert shared == {"sample_safe", "sample_unsafe", "baseline_share"}
    for name in shared:
        assert ours[name].default == theirs[name].default
        assert ours[name].metadata["parse"] is theirs[name].metadata["parse"]


def test_the_documentation_has_every_setting_with_its_default_and_no_other() -> None:
    rows = {name: (default, text) for name, default, text in ROW.findall(DOCS.read_text())}
    wanted = {
        part.name.upper(): (
            f"`{to_env_value(part.default)}`" if to_env_value(part.default) else "",
            part.metadata["doc"],
        )
        for part in dataclasses.fields(EnvoySettings)
    }

    assert rows == wanted
