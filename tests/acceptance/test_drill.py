"""`abreast faults` on a real stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ABREAST = str(Path(sys.executable).with_name("abreast"))


def test_drill_new_errors_moves_users_to_old_and_back_without_safe_errors() -> None:
    command = [ABREAST, "faults", "new-errors", "--seconds", "4", "--json"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)

    assert result.returncode == 0, result.stderr + result.stdout
    (report,) = json.loads(result.stdout)
    assert (report["drill"], report["passed"], report["trouble"]) == ("new-errors", True, "")
    assert report["requests"] > 100
    assert report["safe_errors"] == 0
    assert 0 <= report["until_old"] < 4
    assert report["until_new"] > 0
    assert report["sampled"] > 100
    assert report["lost"] == 0
