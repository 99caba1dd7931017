"""Generate the Python code of the protos.

    python protos/generate.py [FOLDER]

The script writes into the tree, or all files into FOLDER. Use the grpcio-tools of requirements-dev.lock: code from a newer version
can't be imported with an older protobuf, which a user may have.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")  # in the interpreter's folder, which may not be on PATH
NAMES = ("access", "common", "comparison", "latency", "rule", "rollout", "traffic")
API = tuple(f"abreast/v1/{name}.proto" for name in NAMES)
WIRE = ("abreast_sidecar/traffic/xds/wire.proto",)  # messages only: its services are Envoy's
STUBS = ("--grpc_python_out={draft}", "--mypy_grpc_out=only_async:{draft}")


def generate(source: Path, files: tuple[str, ...], target: Path, *extra: str) -> int:
    with tempfile.TemporaryDirectory() as draft:
        code: int = protoc.main(
            [
                "protoc",
                *(f"--plugin={name}={Path(sys.executable).parent / name}" for name in PLUGINS),
                f"--proto_path={source}",
                f"--proto_path={resources.files('grpc_tools') / '_proto'}",
                f"--python_out={draft}",
                f"--mypy_out={draft}",
                *(part.format(draft=draft) for part in extra),
                *(f"{source}/{name}" for name in files),
            ]
        )
        for source_file in sorted(Path(draft).rglob("*.py*")):
            target_file = target / source_file.relative_to(draft)
            target_file.parent.mkdir(parents=True, exist_ok=True)
            target_file.write_bytes(source_file.read_bytes())
    return code


def main(middleware: Path, sidecar: Path) -> int:
    return generate(ROOT / "protos", API, middleware, *STUBS) or generate(ROOT / "sidecar", WIRE, sidecar)


if __name__ == "__main__":
    folders = (Path(sys.argv[1]),) * 2 if len(sys.argv) > 1 else (ROOT / "middleware", ROOT / "sidecar")
    sys.exit(main(*folders))
