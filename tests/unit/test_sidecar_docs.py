"""The page about the sidecar says what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

from abreast_sidecar.compare.model import Outcome
from abreast_sidecar.settings import ENV_PREFIX, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "sidecar.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in found]


def shown(default: object) -> str:
    if default in {"", ()}:
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_every_setting_is_in_the_table_with_its_default() -> None:
    assert rows("Settings") == [
        [f"`{ENV_PREFIX}{part.name.upper()}`", shown(part.default), part.metadata["doc"]]
        for part in dataclasses.fields(Settings)
    ]


def test_every_outcome_is_explained() -> None:
    named = [name for row in rows("The ledger") for name in re.findall(r"`(\w+)`", row[0])]

    assert sorted(named) == sorted(get_args(Outcome))
