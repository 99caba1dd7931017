"""Generates the Python code of the protos: python protos/generate.py [FOLDER]

Into middleware/ (or FOLDER), with the exact grpcio-tools of requirements.lock: code made by a newer one refuses to be
imported under the older protobuf that a user may have.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
NAMES = ("common", "comparison", "traffic")


def main(target: Path) -> int:
    with tempfile.TemporaryDirectory() as draft:
        code: int = protoc.main(
            [
                "protoc",
                f"--proto_path={PROTOS}",
                f"--proto_path={resources.files('grpc_tools') / '_proto'}",
                f"--python_out={draft}",
                f"--mypy_out={draft}",
                f"--grpc_python_out={draft}",
                f"--mypy_grpc_out=only_async:{draft}",
                *(f"{PROTOS}/abreast/v1/{name}.proto" for name in NAMES),
            ]
        )
        for made in sorted(Path(draft).rglob("*.py*")):
            place = target / made.relative_to(draft)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(made.read_bytes())
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent / "middleware"))
