"""Rules of the repository that no linter knows."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ROOT / "middleware/abreast/v1"


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos/generate.py", tmp_path], check=True, capture_output=True)
    generated = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}

    assert generated
    stale = [str(name) for name, text in generated.items() if (_committed(name)).read_text() != text]
    assert not stale, "run make generate"


def _committed(name: Path) -> Path:
    return next(place / name for place in (ROOT / "middleware", ROOT / "sidecar") if (place / name).exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_docs_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]

    assert not missing


def _known_variables() -> set[str]:
    from abreast.settings import Settings as ServiceSettings
    from abreast_sidecar.client.sidecar_client import CREDENTIAL_VARIABLES
    from abreast_sidecar.envoy.settings import EnvoySettings
    from abreast_sidecar.settings import Settings

    declared = [part for kind in (Settings, EnvoySettings, ServiceSettings) for part in kind.declared()]
    files = {f"{part.variable}_FILE" for part in declared if part.secret}
    client = {*CREDENTIAL_VARIABLES.values(), "ABREAST_TOKEN_FILE"}
    exceptions = {"ABREAST_SIDECAR", "ABREAST_TEST_REDIS", "ABREAST_TEST_POSTGRES"}
    return {part.variable for part in declared} | files | client | exceptions


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docker-compose.yml"], ids=lambda page: page.name)
def test_docs_name_only_existing_variables(page: Path) -> None:
    variables = set(re.findall(r"\bABREAST_[A-Z_]+[A-Z]\b", page.read_text()))

    assert variables <= _known_variables()


def test_base_package_depends_on_redis_and_json_writer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert [re.split(r"[\[<>=]", name)[0] for name in project["dependencies"]] == ["msgspec", "orjson", "redis"]


RUNTIME_LOCK, DEV_LOCK = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"


@pytest.mark.parametrize("lock", [RUNTIME_LOCK, DEV_LOCK], ids=lambda lock: lock.name)
def test_lock_is_hashed_and_names_no_index(lock: Path) -> None:
    text = lock.read_text()

    assert all(hashes for _, hashes in _locked(lock).values())
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text)
    assert not (ROOT / "uv.lock").exists()


def test_runtime_lock_holds_every_extra_and_the_build_backend() -> None:
    project = _project()
    expected = [*project["project"]["dependencies"], *project["dependency-groups"]["build"]]
    for extra in project["project"]["optional-dependencies"].values():
        expected += extra

    assert _names(expected) <= _locked(RUNTIME_LOCK).keys(), "run make lock"


def test_dev_lock_holds_the_dev_group_and_not_mutation() -> None:
    groups = _project()["dependency-groups"]
    locked = _locked(DEV_LOCK).keys()

    assert _names(line for line in groups["dev"] if isinstance(line, str)) <= locked, "run make lock"
    assert not _names(groups["mutation"]) & locked


def test_dev_lock_agrees_with_the_runtime_lock() -> None:
    """`make setup` installs one on top of the other."""
    runtime, dev = _locked(RUNTIME_LOCK), _locked(DEV_LOCK)

    assert {name: dev.get(name) for name in runtime} == runtime, "run make lock"


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _names(requirements: Iterable[str]) -> set[str]:
    names = {re.split(r"[\[<>=;! ]", line)[0].lower().replace("_", "-") for line in requirements}
    return names - {"abreast"}


def _locked(lock: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Return each package's version, with its marker, and its hashes."""
    packages = re.split(r"^(?=\S)", lock.read_text(), flags=re.MULTILINE)
    pins = [re.match(r"([^=]+)==(.+?) *\\\n", package) for package in packages if package]
    return {pin[1]: (pin[2], frozenset(re.findall(r"--hash=(\S+)", pin.string))) for pin in pins if pin is not None}
