"""The compose file against the code, without a docker engine."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from click.testing import CliRunner

from abreast.settings import Settings as ServiceSettings
from abreast_sidecar.cli import abreast
from abreast_sidecar.envoy.render import validate_config
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TEXT = COMPOSE.read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SHOP = ("old", "new")
RENDER = re.compile(r"^#   abreast (envoy render .*)$", re.MULTILINE)


def environment(service: str) -> dict[str, str]:
    return {name: str(value) for name, value in SERVICES[service].get("environment", {}).items()}


def ours(service: str) -> dict[str, str]:
    return {name: value for name, value in environment(service).items() if name.startswith("ABREAST_")}


def listening() -> dict[str, set[int]]:
    """Return the ports that each of our services listens on, from its settings."""
    sidecar = Settings.from_environment(ours("sidecar"))
    config = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())
    [listener] = config["static_resources"]["listeners"]
    sockets = [place["address"]["socket_address"] for place in (listener, config["admin"])]
    return {
        "envoy": {socket["port_value"] for socket in sockets},
        "sidecar": {int(address.rpartition(":")[2]) for address in (sidecar.grpc_listen, sidecar.http_listen)},
        **{name: {int(SERVICES[name]["command"][-1].rpartition(":")[2])} for name in SHOP},
        "redis": {6379},
        "cache": {6379},
        "postgres": {5432},
    }


def test_compose_file_is_valid() -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([program, "--builtin-schema", "vendor.compose-spec", COMPOSE], check=True, capture_output=True)


def test_variables_are_settings_of_their_program() -> None:
    known = {"sidecar": Settings, "old": ServiceSettings, "new": ServiceSettings}
    with_variables = {service for service in SERVICES if ours(service)}

    assert with_variables == set(known)
    for service, kind in known.items():
        assert set(ours(service)) <= {f"ABREAST_{part.name.upper()}" for part in dataclasses.fields(kind)}


def test_settings_parse() -> None:
    settings = Settings.from_environment(ours("sidecar"))

    assert settings.envoy_admin == ("http://envoy:9901",)
    for service in SHOP:
        assert ServiceSettings.from_environment(ours(service), {"service": "shop"}).redis_url == settings.redis_url


def test_envoy_configuration_is_fresh() -> None:
    [command] = RENDER.findall(TEXT)
    result = CliRunner().invoke(abreast, shlex.split(command))
    mounted = (ROOT / "envoy/envoy.yaml").read_text()

    assert result.exit_code == 0, result.output
    assert mounted == result.stdout, f"run: abreast {command} --output envoy/envoy.yaml"
    validate_config(mounted)


def test_envoy_addresses_match_compose_file() -> None:
    config = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())
    endpoints = {
        (socket["address"], socket["port_value"])
        for cluster in config["static_resources"]["clusters"]
        for group in cluster.get("load_assignment", {"endpoints": []})["endpoints"]
        for socket in [entry["endpoint"]["address"]["socket_address"] for entry in group["lb_endpoints"]]
    }

    assert {host for host, _port in endpoints} == {"old", "new", "sidecar"}
    for host, port in endpoints:
        assert port in listening()[host]
        assert set(SERVICES["envoy"]["networks"]) & set(SERVICES[host]["networks"])


def test_addresses_name_services_on_a_common_network() -> None:
    for name in SERVICES:
        for value in environment(name).values():
            for host, port in re.findall(r"://(?:\w+@)?([a-z]+):(\d+)", value):
                assert int(port) in listening()[host], value
                assert set(SERVICES[name]["networks"]) & set(SERVICES[host]["networks"]), value


def test_sidecar_command_exists() -> None:
    program, *arguments = SERVICES["sidecar"]["command"]
    result = CliRunner().invoke(abreast, [*arguments, "--help"])

    assert program == "abreast"
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("version", SHOP)
def test_shop_command_accepts_its_arguments(version: str) -> None:
    python, *arguments = SERVICES[version]["command"]
    bare = {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, env=bare)

    assert python == "python"
    assert arguments[arguments.index("--version") + 1] == version
    assert done.stderr == "shop: set DATABASE_URL and CACHE_URL\n"
    assert {"DATABASE_URL", "CACHE_URL", "ABREAST_REDIS_URL"} <= environment(version).keys()


def test_published_ports_are_on_loopback_and_listen() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert set(published) == {"envoy", "sidecar"}
    for name, ports in published.items():
        for port in ports:
            address, outside, inside = port.rsplit(":", 2)
            assert address == "127.0.0.1"
            assert outside == inside
            assert int(inside) in listening()[name]


def test_admin_interface_is_unpublished_and_read_only() -> None:
    config = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())

    assert "allow_paths" in config["admin"]
    assert not [port for port in SERVICES["envoy"]["ports"] if "9901" in port]


def test_mounts_exist_and_are_read_only() -> None:
    for service in SERVICES.values():
        for source, _target, *mode in (mount.split(":") for mount in service.get("volumes", ())):
            if source.startswith("."):
                assert (ROOT / source).is_file()
                assert mode == ["ro"]
            else:
                assert source in FILE["volumes"]


def test_dependencies_exist_and_have_health_checks() -> None:
    for service in SERVICES.values():
        for name, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[name]


def test_services_have_health_checks_and_no_privileges() -> None:
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        built = "build" in service  # the Dockerfile's user
        assert built or re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]), name
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_health_checks_request_existing_paths() -> None:
    asked = {
        name: re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", str(SERVICES[name]["healthcheck"])) for name in (*SHOP, "sidecar")
    }

    assert asked == {"old": [("8000", "/healthz")], "new": [("8000", "/healthz")], "sidecar": [("8090", "/readyz")]}
    assert all(int(port) in listening()[name] for name, [(port, _path)] in asked.items())


def test_images_are_pinned() -> None:
    foreign = {service["image"] for service in SERVICES.values() if "build" not in service}

    assert {image for image in foreign if not re.search(r":v?\d+\.\d+", image)} == set()
    assert "envoyproxy/envoy:v1.40.0" in foreign


def test_compose_file_contains_no_secret() -> None:
    secret = re.compile(r"password|passwd|secret|token|key", re.IGNORECASE)
    for name in SERVICES:
        for variable, value in environment(name).items():
            assert not re.search(r"://[^/@]*:[^/@]*@", value), variable
            if secret.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), variable


def test_versions_of_the_shop_have_separate_databases(postgres_server: PostgresServer) -> None:
    wanted = {environment(name)["DATABASE_URL"].rpartition("/")[2] for name in SHOP}
    with psycopg.connect(postgres_server.url(), autocommit=True) as connection:
        for statement in re.findall(r"^create .*;$", (ROOT / "demo/databases.sql").read_text(), re.MULTILINE):
            connection.execute(statement.encode())
        found = {name for (name,) in connection.execute("select datname from pg_database").fetchall()}
        for name in wanted & found:
            connection.execute(f"drop database {name}".encode())

    assert len(wanted) == 2
    assert wanted <= found


def test_image_is_built_from_existing_files() -> None:
    copies = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)
