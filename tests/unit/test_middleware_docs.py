"""The page says what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette

from abreast import ParallelRunMiddleware
from abreast.export import queue as backlog
from abreast.settings import ENV_PREFIX, REQUEST_HEADERS, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "middleware.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in found]


def shown(default: object) -> str:
    if default in {"", ()}:
        return "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_every_setting_is_in_the_table_with_its_default() -> None:
    wanted = [
        [f"`{part.name}`", f"`{ENV_PREFIX}{part.name.upper()}`", shown(part.default), part.metadata["doc"]]
        for part in dataclasses.fields(Settings)
    ]
    special = {"`service`": "needed", "`request_headers`": "see below"}

    assert rows("Settings") == [
        [name, variable, special.get(name, value), doc] for name, variable, value, doc in wanted
    ]


def test_it_is_added_as_shown() -> None:
    """To FastAPI, and to any application."""
    added, around = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"app": FastAPI()}
    exec(added, names)  # noqa: S102  # our own page
    outermost = names["app"].user_middleware[0]
    names |= {"app": Starlette(), "ParallelRunMiddleware": ParallelRunMiddleware}
    exec(around, names)  # noqa: S102

    assert outermost.cls is ParallelRunMiddleware
    for made in (ParallelRunMiddleware(Starlette(), **outermost.kwargs), names["app"]):
        assert (made.problem, made.settings.service) == ("", "shop")


def test_the_default_request_headers_are_listed() -> None:
    listed = PAGE.split("`request_headers` is by default")[1].split(".\n")[0]

    assert tuple(re.findall(r"`([a-z-]+)`", listed)) == REQUEST_HEADERS


def test_every_reason_for_a_drop_is_listed() -> None:
    reasons = {value for name, value in vars(backlog).items() if name.isupper() and isinstance(value, str)}

    assert {row[0].strip("`") for row in rows("When Redis is slow, full or down")} == reasons
