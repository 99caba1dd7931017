"""docs/sidecar.md agrees with the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

from abreast.settings import format_value
from abreast_sidecar.compare.model import Outcome
from abreast_sidecar.settings import ENV_PREFIX, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "sidecar.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line] for line in lines]


def format_default(default: object) -> str:
    return "none" if default in {"", ()} else f"`{format_value(default)}`"


def test_docs_list_each_setting_with_its_default() -> None:
    assert rows("Settings") == [
        [f"`{ENV_PREFIX}{part.name.upper()}`", format_default(part.default), part.metadata["doc"]]
        for part in dataclasses.fields(Settings)
    ]


def test_docs_explain_each_outcome() -> None:
    outcomes = [name for row in rows("The ledger") for name in re.findall(r"`(\w+)`", row[0])]

    assert sorted(outcomes) == sorted(get_args(Outcome))
