"""abreast.yaml: its fields, the errors of `abreast config check`, the JSON schema and the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from abreast_sidecar.cli.serve import config_command, envoy_command
from abreast_sidecar.envoy.config import ConfigError, build_schema, list_fields, load_config, parse_config
from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress, StickyKey, list_conflicts
from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
ROW = re.compile(r"^\| `([a-zA-Z0-9._]+)` \| (.*?) \| (.+) \|$", re.MULTILINE)
SERVICE = """
services:
  shop:
    old: {endpoints: [10.0.0.11:8000, 10.0.0.12:8000], keepalive: 1.5}
    new:
      endpoints: shop-new.internal:8000
      capture: middleware
    sticky: cookie:session
    sample_safe: 25%
    connection_per_client: on
"""
VERSIONS = "{old: {endpoints: a:1}, new: {endpoints: a:2}"


def check(text: str) -> list[str]:
    try:
        parse_config(text)
    except ConfigError as error:
        return [line.removeprefix("abreast.yaml:") for line in error.lines]
    return []


def services(**fields: str) -> list[EnvoySettings]:
    """Return services that have only hosts and prefixes: `shop="a.example /x"`."""
    return [
        EnvoySettings(
            service=name,
            hosts=tuple(part for part in text.split() if not part.startswith("/")),
            prefixes=tuple(part for part in text.split() if part.startswith("/")),
        )
        for name, text in fields.items()
    ]


def test_fields_have_the_values_of_their_settings() -> None:
    [settings] = parse_config(SERVICE).build_services({})

    assert settings == EnvoySettings(
        service="shop",
        old=(SocketAddress("10.0.0.11", 8000), SocketAddress("10.0.0.12", 8000)),
        new=(SocketAddress("shop-new.internal", 8000),),
        old_keepalive=1.5,
        new_capture="middleware",
        sticky=StickyKey("cookie", "session"),
        sample_safe=0.25,
        connection_per_client=True,
    )


def test_every_setting_of_envoy_is_a_field_except_secrets_and_the_name() -> None:
    fields = {declared.name for _place, declared in list_fields()}
    secrets = {"tester_secret"}  # the others can be env:NAME

    assert {part.name for part in EnvoySettings.declared()} - fields == {"service", *secrets}
    assert {part.name for part in Settings.declared() if not part.secret} <= fields


def test_option_overrides_variable_and_variable_overrides_file_for_the_whole_envoy() -> None:
    config = parse_config("envoy: {listen: ':1', admin: ':2', node_id: edge}" + SERVICE)
    environment = {"ABREAST_LISTEN": ":10", "ABREAST_ADMIN": ":11", "ABREAST_NODE_ID": "", "ABREAST_OLD": "b:1"}
    [settings] = config.build_services(environment, {"listen": ":20", "old": None})

    assert (settings.listen.port, settings.admin.port, settings.node_id) == (20, 11, "edge")
    assert settings.old[0].port == 8000


def test_option_of_a_service_is_refused_beside_a_file() -> None:
    with pytest.raises(SettingError, match="--per-try-timeout and --config exclude each other"):
        parse_config(SERVICE).build_services({}, {"per_try_timeout": "3"})


def test_error_names_option_or_variable() -> None:
    for environment, options, name in (
        ({"ABREAST_LISTEN": "x"}, {}, "ABREAST_LISTEN"),
        ({}, {"listen": "x"}, "--listen"),
    ):
        with pytest.raises(SettingError, match=f"^{name} must be an IP address"):
            parse_config(SERVICE).build_services(environment, options)


def test_sidecar_reads_its_section_below_variables() -> None:
    config = parse_config("sidecar: {retention_days: 7, workers: 2, page_hosts: [a.example, b.example]}" + SERVICE)
    settings = Settings.from_environment(config.build_environment({"ABREAST_WORKERS": "3"}))

    assert (settings.retention_days, settings.workers, settings.page_hosts) == (7, 3, ("a.example", "b.example"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: the file is empty"),
        ("services: [", "1: not valid YAML"),
        ("envoy: {}", "1: the file has no services"),
        ("services: {}", "1: the file has no services"),
        ("envoy:\n  listen: 8080" + SERVICE, "2: envoy.listen must be an IP address and port .*, got '8080'"),
        ("envoy:\n  lissten: ':1'" + SERVICE, "2: envoy has no field 'lissten': use one of listen,"),
        ("envoy:\n  node_id: [a]" + SERVICE, "2: envoy.node_id must be a single value, got a list"),
        ("envoy:\n  edge_key: 0123456789abcdef" + SERVICE, "2: envoy.edge_key must be env:NAME, so that the file contains no"),
        ("envoy:\n  tls_key: a.pem" + SERVICE, "2: envoy.tls_certificate and envoy.tls_key go together"),
        ("sidecar:\n\n  workers: many" + SERVICE, "3: sidecar.workers must be a whole number of processes"),
        ("sidecar: {sample_safe: 1}" + SERVICE, "1: sidecar has no field 'sample_safe'"),
        ("services:\n  shop:", "2: services.shop must be a mapping"),
        ("services:\n  a/b: " + VERSIONS + "}", "2: services.a/b: the name of a service must have 1 to 60 letters"),
        ("services:\n  shop:\n    old: {endpoints: a:1}", "3: services.shop has no new: add `new:`"),
        (SERVICE + "    new: {endpoints: a:1}", "11: services.shop.new is there twice, first in line 5: delete one"),
        (SERVICE.replace("endpoints: shop-new.internal:8000", "tls: a"), "6: services.shop.new has no endpoints"),
        (SERVICE.replace("cookie:session", ""), "8: services.shop.sticky must be a value: write one, or delete"),
        (SERVICE + "    request_timeout: 3", "11: services.shop.per_try_timeout must be below services.shop.request_timeout"),
        (SERVICE + "    prefixes: [shop]", r"11: services.shop.prefixes must be path prefixes such as /shop"),
        (SERVICE + "    hosts: ['a,b']", r"11: services.shop.hosts must be a list of values without commas"),
        (SERVICE + "  cart: " + VERSIONS + "}", "11: the services shop and cart both match / at any host"),
    ],
)  # fmt: skip
def test_check_names_line_field_and_remedy(text: str, expected: str) -> None:
    problems = check(text)

    assert any(re.match(expected, problem) for problem in problems), problems


def test_check_reports_all_errors_in_the_order_of_lines() -> None:
    lines = check("envoy:\n  listen: x\n  foo: 1\nservices:\n  shop:\n    old: {endpoints: a}\n    new: {}\n")

    assert [int(line.partition(":")[0]) for line in lines] == [2, 3, 6, 7]


def test_secret_is_not_shown() -> None:
    assert "hunter2hunter2hunter2" not in str(check("envoy: {edge_key: hunter2hunter2hunter2}" + SERVICE))


@pytest.mark.parametrize(
    ("fields", "conflicts"),
    [
        ({"shop": "", "cart": ""}, ["/ at any host"]),
        ({"shop": "/a", "cart": "/b"}, []),
        ({"shop": "/a", "cart": "/ab"}, []),
        ({"shop": "/", "cart": "/cart"}, []),
        ({"shop": "/x /a", "cart": "/y /a"}, ["/a at any host"]),
        ({"shop": "a.example", "cart": "b.example"}, []),
        ({"shop": "a.example", "cart": "a.example"}, ["/ at a.example"]),
        ({"shop": "*.example", "cart": "a.example"}, []),
        ({"shop": "*.b.example", "cart": "*.example /"}, []),
        ({"shop": "a.example", "cart": "/cart"}, ["/cart at a.example"]),
        ({"shop": "*.example /x", "cart": "a.example /"}, ["/x at a.example"]),
        ({"shop": "", "cart": "/cart", "rest": "/cart/x"}, []),
    ],
)
def test_services_that_match_the_same_request_conflict_unless_one_is_more_specific(
    fields: dict[str, str], conflicts: list[str]
) -> None:
    found = list(list_conflicts(services(**fields)))

    assert [request for _names, request in found] == conflicts
    assert all(names == ("shop", "cart") for names, _request in found)


def test_routes_prefer_longer_prefixes_and_narrower_hosts() -> None:
    loaded = yaml.safe_load(
        render_config(*services(rest="", api="/api /v2/api", shop="*.example", cart="a.example /cart"))
    )
    manager = loaded["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    hosts = {
        tuple(host["domains"]): list(dict.fromkeys(
            (route["name"].partition("-")[0], route["match"].get("path_separated_prefix", "/")) for route in host["routes"]
        ))
        for host in manager["route_config"]["virtual_hosts"]
    }  # fmt: skip

    apis = [("api", "/v2/api"), ("api", "/api")]
    assert hosts == {
        ("*",): [*apis, ("rest", "/")],
        ("*.example",): [*apis, ("shop", "/")],
        ("a.example",): [("api", "/v2/api"), ("cart", "/cart"), ("api", "/api"), ("shop", "/")],
    }


def test_one_service_of_a_file_renders_as_from_options(tmp_path: Path) -> None:
    file = tmp_path / "abreast.yaml"
    file.write_text("envoy: {listen: ':8080'}\nservices:\n  shop: {old: {endpoints: a:1}, new: {endpoints: b:1}}\n")
    by_file = CliRunner().invoke(envoy_command, ["render", "--config", str(file), "--no-validate"])
    by_options = CliRunner().invoke(
        envoy_command,
        ["render", "--service", "shop", "--listen", ":8080", "--old", "a:1", "--new", "b:1", "--no-validate"],
    )

    assert by_file.exit_code == 0
    assert by_file.stdout == by_options.stdout


def test_check_command_exits_with_1_and_prints_errors(tmp_path: Path) -> None:
    file = tmp_path / "abreast.yaml"
    file.write_text("services:\n  shop: {}\n")
    result = CliRunner().invoke(config_command, ["check", str(file)], standalone_mode=False)

    assert result.return_value == 1
    assert f"{file}:2: services.shop has no old" in result.stdout


def test_check_command_accepts_a_file(tmp_path: Path) -> None:
    file = tmp_path / "abreast.yaml"
    file.write_text(SERVICE)
    result = CliRunner().invoke(config_command, ["check", str(file)], standalone_mode=False)

    assert (result.return_value, result.stdout) == (0, f"{file} is valid, with 1 service: shop\n")


def test_file_that_can_not_be_read_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "abreast.yaml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "abreast.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(SettingError, match="can't be read"):
            load_config(path)


def test_schema_describes_every_field() -> None:
    schema = json.loads(CliRunner().invoke(config_command, ["schema"]).stdout)

    assert schema == build_schema()
    Draft202012Validator.check_schema(schema)
    for place, declared in list_fields():
        node: dict[str, Any] = schema
        for name in place.split("."):
            node = node["additionalProperties"] if name == "NAME" else node["properties"][name]
        assert node["description"] == declared.doc
        assert "type" in node


def test_schema_accepts_the_example_and_refuses_unknown_fields() -> None:
    validator = Draft202012Validator(build_schema())
    example = yaml.safe_load(SERVICE)

    validator.validate(example)
    example["services"]["shop"]["colour"] = "red"
    assert not validator.is_valid(example)


def test_docs_list_every_field_with_its_default() -> None:
    rows = {place: (default, doc) for place, default, doc in ROW.findall(PAGE)}

    assert rows == {
        place.replace("services.NAME.", ""): (
            f"`{declared.default_text}`" if declared.default_text and not place.endswith(".endpoints") else "",
            declared.doc,
        )
        for place, declared in list_fields()
    }


def test_docs_examples_are_valid() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)

    assert examples
    for example in examples:
        parse_config(example)
        Draft202012Validator(build_schema()).validate(yaml.safe_load(example))
