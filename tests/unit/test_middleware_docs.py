"""docs/middleware.md and the code agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette

from abreast import ParallelRunMiddleware
from abreast.export import queue
from abreast.settings import REQUEST_HEADERS, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "middleware.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_docs_list_every_setting_with_its_default() -> None:
    defaults = {"service": "needed", "request_headers": "see below"}

    assert rows("Settings") == [
        [
            f"`{setting.name}`",
            f"`{setting.variable}`",
            defaults.get(setting.name, f"`{setting.default_text}`" if setting.default_text else "empty"),
            setting.doc,
        ]
        for setting in Settings.declared()
    ]


def test_docs_examples_add_the_middleware() -> None:
    """The examples are for FastAPI, for any other ASGI app, for Flask and for Django."""
    add_to_fastapi, wrap_app, wrap_flask, wrap_django = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"app": FastAPI()}
    exec(add_to_fastapi, names)  # noqa: S102  # our own page
    outermost = names["app"].user_middleware[0]
    names |= {"app": Starlette(), "ParallelRunMiddleware": ParallelRunMiddleware}
    exec(wrap_app, names)  # noqa: S102

    assert outermost.cls is ParallelRunMiddleware
    wsgi_names: dict[str, Any] = {"app": Flask("shop"), "get_wsgi_application": lambda: Flask("shop").wsgi_app}
    for example in (wrap_flask, wrap_django):
        exec(example, wsgi_names)  # noqa: S102
    for middleware in (
        ParallelRunMiddleware(Starlette(), **outermost.kwargs),
        names["app"],
        wsgi_names["app"].wsgi_app,
        wsgi_names["application"],
    ):
        assert (middleware.problem, middleware.settings.service) == ("", "shop")


def test_docs_list_the_default_request_headers() -> None:
    sentence = PAGE.split("`request_headers` is by default")[1].split(".\n")[0]

    assert tuple(re.findall(r"`([a-z-]+)`", sentence)) == REQUEST_HEADERS


def test_docs_list_every_drop_reason() -> None:
    reasons = {value for name, value in vars(queue).items() if name.isupper() and isinstance(value, str)}

    assert {row[0].strip("`") for row in rows("When Redis is slow, full or down")} == reasons
