from __future__ import annotations

import dataclasses
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.cli.serve import envoy_command
from abreast_sidecar.envoy.render import _quote, render_config, validate_config
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress, StickyKey
from abreast_sidecar.errors import SettingError, SidecarError
from support_certificate import self_signed

ROOT = Path(__file__).parents[2]
EDGE_KEY = "0123456789abcdef"
ROUTES = ["safe_baseline", "safe_sampled", "safe_plain", "unsafe_sampled", "unsafe_plain"]
LIVE_CLUSTERS = ["old", "new", "old_fallback", "new_or_old", "drilled", "drilled_or_old"]
COPY_CLUSTERS = ["old_shadow", "new_shadow", "old_baseline", "new_baseline"]
CLUSTERS = [*LIVE_CLUSTERS, *COPY_CLUSTERS, "collector", "sidecar", "admin"]


def config(**changes: Any) -> dict[str, Any]:
    loaded = yaml.safe_load(render_config(EnvoySettings(**changes)))
    assert isinstance(loaded, dict)
    return loaded


def clusters(loaded: dict[str, Any]) -> dict[str, Any]:
    return {cluster["name"]: cluster for cluster in loaded["static_resources"]["clusters"]}


def manager(loaded: dict[str, Any]) -> Any:
    listener, *_internal = loaded["static_resources"]["listeners"]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def addresses(cluster: dict[str, Any]) -> list[tuple[str, int]]:
    matches = [
        entry["endpoint"]["address"]["socket_address"]
        for entry in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    return [(address["address"], address["port_value"]) for address in matches]


def test_routes_and_clusters_have_fixed_names() -> None:
    loaded = config()
    [host] = manager(loaded)["route_config"]["virtual_hosts"]

    assert host["name"] == "service"
    assert [route["name"] for route in host["routes"]] == ROUTES
    assert [route["stat_prefix"] for route in host["routes"]] == ROUTES
    assert list(clusters(loaded)) == CLUSTERS


def test_tester_secret_adds_routes() -> None:
    text = render_config(EnvoySettings(tester_secret="0123456789abcdef"))
    [host] = manager(yaml.safe_load(text))["route_config"]["virtual_hosts"]
    kinds = ("safe_sampled", "safe_plain", "unsafe_sampled", "unsafe_plain")

    assert [route["name"] for route in host["routes"]] == [
        *(f"tester_{use}_{kind}" for use in ("old", "new") for kind in kinds),
        *ROUTES,
    ]
    assert "tester" not in render_config(EnvoySettings())
    validate_config(text)


def test_every_route_has_a_hash_policy() -> None:
    for sticky in (StickyKey(), StickyKey("header", "x-user"), StickyKey("cookie", "user"), StickyKey("source-ip")):
        [host] = manager(config(sticky=sticky))["route_config"]["virtual_hosts"]
        policies = [route["route"]["hash_policy"] for route in host["routes"]]

        assert all(policy[-1] == {"header": {"header_name": "x-request-id"}} for policy in policies)
        assert {len(policy) for policy in policies} == {2 if sticky.kind else 1}


def test_uncopied_paths_have_routes_before_sampled_ones() -> None:
    text = render_config(EnvoySettings(uncopied_paths=("/links/*", "/a.b"), tester_secret="0123456789abcdef"))
    [host] = manager(yaml.safe_load(text))["route_config"]["virtual_hosts"]
    first_routes = host["routes"][:6]

    assert [route["name"].rpartition("safe_")[2] for route in first_routes] == ["uncopied"] * 6
    assert {route["match"]["safe_regex"]["regex"] for route in first_routes} == {"/links/.*|/a[.]b"}
    assert "typed_per_filter_config" not in str([route["match"] for route in first_routes])
    validate_config(text)


def test_scheme_is_kept_from_private_addresses_unless_hops_are_set() -> None:
    def hops(**changes: Any) -> list[tuple[bool, int]]:
        chains = config(**changes)["static_resources"]["listeners"][0]["filter_chains"]
        return [
            ("filter_chain_match" in chain, chain["filters"][0]["typed_config"]["xff_num_trusted_hops"])
            for chain in chains
        ]

    assert hops() == [(True, 1), (False, 0)]
    assert hops(trusted_hops=2) == [(False, 2)]


def test_addresses_are_static_and_names_are_resolved() -> None:
    old = (SocketAddress("10.0.0.7", 8000), SocketAddress("::1", 8001))
    new = (SocketAddress("shop.internal", 8000), SocketAddress("10.0.0.8", 8000))
    rendered = clusters(config(old=old, new=new))

    for name in ("old", "old_shadow", "old_baseline"):
        assert (rendered[name]["type"], addresses(rendered[name])) == ("STATIC", [*old])
    for name in ("new", "new_shadow"):
        assert (rendered[name]["type"], addresses(rendered[name])) == ("STRICT_DNS", [*new])


def test_endpoints_have_version_metadata() -> None:
    rendered = clusters(config(old=(SocketAddress("10.0.0.7", 8000), SocketAddress("10.0.0.8", 8000))))
    for name in ("old", "new", "old_fallback", "old_shadow", "new_shadow", "old_baseline"):
        entries = rendered[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        versions = {entry["metadata"]["filter_metadata"]["abreast"]["version"] for entry in entries}

        assert versions == {name.partition("_")[0]}


def test_base_layer_sends_users_to_old_and_sets_sampling() -> None:
    base, above, admin = config(sample_safe=0.2, baseline_share=0.05, sample_unsafe=0.000001)["layered_runtime"][
        "layers"
    ]

    assert base["static_layer"]["abreast"]["weight"] == {"old": 10000, "new_or_old": 0, "drilled_or_old": 0}
    assert base["static_layer"]["abreast"]["sample"] == {
        "baseline": {"numerator": 10_000, "denominator": "MILLION"},
        "safe": {"numerator": 200_000, "denominator": "MILLION"},
        "unsafe": {"numerator": 1, "denominator": "MILLION"},
    }
    assert (above["name"], above["rtds_layer"]["name"]) == ("abreast", "abreast")
    assert "admin_layer" in admin


def test_admin_socket_has_a_path_for_each_port() -> None:
    """Two Envoys of a machine differ in the port."""
    default = config(admin=SocketAddress("0.0.0.0", 9902))["admin"]["address"]["pipe"]
    chosen = config(admin_socket="/run/envoy/admin.sock")["admin"]["address"]["pipe"]

    assert default == {"path": "/tmp/abreast-envoy-9902.sock", "mode": 0o600}  # noqa: S108  # Envoy removes an old one of its user
    assert chosen == {"path": "/run/envoy/admin.sock", "mode": 0o600}


@given(st.text())
def test_any_text_is_quoted(text: str) -> None:
    assert yaml.safe_load(f"[{_quote(text)}, after]") == [text, "after"]


def test_quoted_text_stays_one_yaml_scalar() -> None:
    text = "a\"\nadmin: {}\n'#%{{x}} \\"
    loaded = config(node_id=text, tls_certificate=text, tls_key=text, old_ca=text, old_tls=text)
    chain = loaded["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"]
    [pair] = chain["typed_config"]["common_tls_context"]["tls_certificates"]

    assert loaded["node"]["id"] == text
    assert loaded["admin"] == config()["admin"]
    assert (pair["certificate_chain"]["filename"], pair["private_key"]["filename"]) == (text, text)
    assert clusters(loaded)["old"]["transport_socket"]["typed_config"]["sni"] == text


VARIANTS: list[dict[str, Any]] = [
    {},
    {
        "old": (SocketAddress("::1", 8000),),
        "new": (SocketAddress("a.b", 1), SocketAddress("1.2.3.4", 2)),
        "listen": SocketAddress("::", 80),
    },
    {"sticky": StickyKey("header", "x-user"), "request_timeout": 30.0, "access_log": True},
    {"sticky": StickyKey("cookie", "user"), "per_try_timeout": 0.0, "health_path": "tcp"},
    {"sticky": StickyKey("source-ip"), "upstream_http2": True, "trusted_hops": 2, "idle_timeout": 300.0},
    {"concurrent_paths": ("/a-b/*", "/x"), "uncopied_paths": ("/links/*",), "connection_per_client": True},
    {"max_requests_per_connection": 1, "old_keepalive": 0.5, "new_keepalive": 4.0, "old_connect_timeout": 5.0},
    {"edge_key": EDGE_KEY, "tester_secret": "0123456789abcdef"},
    {"edge_key": "env:ABREAST_EDGE_KEY", "upstream_http2": True},
    {"node_id": 'quote " backslash \\ é 🚲 # : {', "service": "shop-1", "admin": SocketAddress("0.0.0.0", 9901)},
    {"old_tls": "shop.internal", "new_tls": "shop-2.internal", "shadow_concurrency": 1, "mirror_body_limit": 1},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "defaults")
def test_rendered_configuration_passes_validation(changes: dict[str, Any], tmp_path: Path) -> None:
    authority = str(self_signed(tmp_path, "shop.internal").certificate)

    validate_config(render_config(EnvoySettings(**{"old_ca": authority, "new_ca": authority, **changes})))


def test_rendered_configuration_is_readable() -> None:
    text = render_config(EnvoySettings())

    assert text.startswith("# Envoy in front of two versions")
    assert text.endswith("\n")
    assert "{%" not in text
    assert "{{" not in text
    assert not re.search(r"\n\n\n|[ \t]\n", text)


def test_validation_error_is_envoys_message_in_one_line() -> None:
    with pytest.raises(SidecarError) as error:
        validate_config("node: {idd: 1}")

    assert str(error.value).startswith("envoy rejects the configuration: ")
    assert "no such field" in str(error.value)
    assert "\n" not in str(error.value)
    assert "envoy.yaml" not in str(error.value)


def test_render_options_override_variables() -> None:
    result = CliRunner().invoke(
        envoy_command,
        ["render", "--new", "10.0.0.8:80", "--access-log"],
        env={"ABREAST_NEW": "10.0.0.9:80", "ABREAST_SERVICE": "shop"},
    )
    settings = EnvoySettings(new=(SocketAddress("10.0.0.8", 80),), service="shop", access_log=True)

    assert result.exit_code == 0, result.output
    assert result.stdout == render_config(settings)


def test_render_output_passes_validate_command(tmp_path: Path) -> None:
    output = tmp_path / "envoy.yaml"
    result = CliRunner().invoke(envoy_command, ["render", "--output", str(output)])
    checked = CliRunner().invoke(envoy_command, ["validate", str(output)])

    assert (result.exit_code, result.stdout) == (0, "")
    assert output.read_text() == render_config(EnvoySettings())
    assert (checked.exit_code, checked.stdout) == (0, f"{output} is valid\n")


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ([], 0o644),
        (["--edge-key", "env:ABREAST_EDGE_KEY"], 0o644),
        (["--edge-key", "0123456789abcdef"], 0o600),
        (["--tester-secret", "0123456789abcdef"], 0o600),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_render_output_with_secret_is_readable_for_its_owner_only(
    arguments: list[str], mode: int, exists: bool, tmp_path: Path
) -> None:
    output = tmp_path / "envoy.yaml"
    if exists:
        output.touch(0o644)
    before = os.umask(0o022)
    try:
        result = CliRunner().invoke(envoy_command, ["render", *arguments, "--output", str(output)])
    finally:
        os.umask(before)

    assert result.exit_code == 0, result.output
    assert stat.S_IMODE(output.stat().st_mode) == mode


def test_edge_key_is_in_the_clusters_of_services_and_the_collector_only() -> None:
    loaded = config(edge_key=EDGE_KEY)
    with_key = {entry["name"] for entry in loaded["static_resources"]["clusters"] if EDGE_KEY in str(entry)}
    live = {"old", "new", "new_or_old", "drilled_or_old"}

    assert with_key == {*live, *COPY_CLUSTERS, "shadow_calls", "collector"}
    listeners = str(loaded["static_resources"]["listeners"])
    assert EDGE_KEY not in listeners.replace(f'local KEY = "{EDGE_KEY}"', "")  # the check of calls of shadows
    assert "key: x-abreast-key" not in render_config(EnvoySettings())


@pytest.mark.parametrize("key", ["short", "0123456789abcde,", "0123456789abcdef%", "env:", "env:a b", "a" * 201])
def test_invalid_edge_key_is_rejected_and_not_shown(key: str) -> None:
    with pytest.raises(SettingError, match=r"ABREAST_EDGE_KEY must be 16 to 200 .*, got a value that is not shown"):
        EnvoySettings.from_environment({"ABREAST_EDGE_KEY": key})

    assert EDGE_KEY not in repr(EnvoySettings(edge_key=EDGE_KEY))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ["--old-tls", "a b"],
            {},
            "--old-tls must be the name in the version's certificate, such as shop.internal, got 'a b'",
        ),
        ([], {"ABREAST_OLD": "x"}, "ABREAST_OLD must be an address such as 10.0.0.7:8000"),
        (["--tls-key", "k"], {}, "ABREAST_TLS_CERTIFICATE and --tls-key go together"),
        (["--output", "/nowhere/envoy.yaml"], {}, "--output can't be written: No such file or directory"),
    ],
)
def test_invalid_setting_is_named_by_option_or_variable(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    result = CliRunner().invoke(envoy_command, ["render", *arguments], env=environment)

    assert isinstance(result.exception, SettingError)
    assert str(result.exception).startswith(message)


def test_render_validates_unless_disabled() -> None:
    arguments = ["render", "--tls-certificate", "/nowhere.pem", "--tls-key", "/nowhere.key"]
    result = CliRunner().invoke(envoy_command, arguments)
    unasked = CliRunner().invoke(envoy_command, [*arguments, "--no-validate"])

    assert isinstance(result.exception, SidecarError)
    assert "/nowhere.key" in str(result.exception)
    assert unasked.exit_code == 0


def test_every_setting_has_an_option() -> None:
    flags = {option for parameter in envoy_command.commands["render"].params for option in parameter.opts}

    assert {f"--{part.name.replace('_', '-')}" for part in dataclasses.fields(EnvoySettings)} <= flags


def test_template_link_points_to_the_package() -> None:
    link = ROOT / "envoy" / "envoy.yaml.j2"

    assert link.is_symlink()
    assert link.resolve() == ROOT / "sidecar" / "abreast_sidecar" / "envoy" / "envoy.yaml.j2"
