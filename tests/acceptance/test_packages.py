"""The wheel, with no more than what each extra brings."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packages")  # share the module's servers

ROOT = Path(__file__).parents[2]
BARE = ("redis", "hiredis", "msgspec", "orjson")
OLDER_PYTHON = ("async_timeout",)  # redis needs it below 3.11.3
CLIENT = (*BARE, "grpc", "google", "typing_extensions.py")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("abreast-*.whl"))


def site(wheel: Path, folder: Path, packages: tuple[str, ...]) -> Path:
    """Return a folder with the packages of the wheel, and the named ones of the environment."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)  # built a moment ago
    present = [name for name in OLDER_PYTHON if (Path(sysconfig.get_path("platlib")) / name).is_dir()]
    for package in (*packages, *present):
        (folder / package).symlink_to(Path(sysconfig.get_path("platlib")) / package)
    return folder


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program], capture_output=True, text=True, check=False
    )


def test_base_package_contains_middleware(wheel: Path, tmp_path: Path) -> None:
    program = "from abreast import ParallelRunMiddleware; ParallelRunMiddleware(None, service='shop'); print(sorted(sys.modules))"
    process = run(site(wheel, tmp_path, BARE), program)

    assert process.returncode == 0, process.stderr
    for heavy in ("grpc", "google.protobuf", "psycopg", "structlog", "starlette", "click"):
        assert f"'{heavy}'" not in process.stdout


def test_base_package_command_names_extra_to_install(wheel: Path, tmp_path: Path) -> None:
    process = run(site(wheel, tmp_path, BARE), "from abreast._console import main; main()")

    assert process.returncode != 0
    assert process.stderr == "abreast: the command line needs more packages; run: pip install 'abreast[sidecar]'\n"


def test_client_extra_suffices_for_a_client(wheel: Path, tmp_path: Path) -> None:
    program = "from abreast.v1 import comparison_pb2, comparison_pb2_grpc, traffic_pb2_grpc; print('ok')"
    process = run(site(wheel, tmp_path, CLIENT), program)

    assert (process.stdout, process.returncode) == ("ok\n", 0), process.stderr


def test_wheel_contains_data_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    assert {
        "abreast/py.typed",
        "abreast/protocol/join.lua",
        "abreast_sidecar/py.typed",
        "abreast_sidecar/envoy/envoy.yaml.j2",
        "abreast_sidecar/store/schema.sql",
        "abreast_sidecar/store/queries/pairs.sql",
        "abreast_sidecar/lua/expire_pairs.lua",
        "abreast_demo/service.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]
