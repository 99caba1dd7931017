from __future__ import annotations

import re
from pathlib import Path

import pytest

from abreast_demo import new, old
from abreast_demo.planted_changes import PLANTED_ADDITIONS, PLANTED_NOISE, PLANTED_REGRESSIONS, PlantedChange
from abreast_demo.shop import Shop

ROOT = Path(__file__).parents[2]


def test_every_planted_mistake_is_marked_where_it_was_made() -> None:
    marks = re.findall(r"# planted: (.+)", (ROOT / "demo/abreast_demo/new.py").read_text())
    marked = [name for mark in marks for name in mark.split(", ")]

    assert sorted(marked) == sorted(plant.name for plant in PLANTED_REGRESSIONS)


def test_the_old_version_holds_none() -> None:
    assert "planted" not in (ROOT / "demo/abreast_demo/old.py").read_text()


@pytest.mark.parametrize(
    "plant", [*PLANTED_REGRESSIONS, *PLANTED_ADDITIONS, *PLANTED_NOISE], ids=lambda plant: plant.name
)
def test_a_plant_is_at_an_endpoint_that_both_versions_have(plant: PlantedChange) -> None:
    method, _, route = plant.location.endpoint.partition(" ")
    shop = Shop("postgresql://127.0.0.1/none", "redis://127.0.0.1/0")

    assert method == "GET"
    assert route in {str(path) for path in new.build_fastapi_app(shop).openapi()["paths"]}
    assert route in _paths(old.build_starlette_app(shop).routes)


@pytest.mark.parametrize(
    "plant", [*PLANTED_REGRESSIONS, *PLANTED_ADDITIONS, *PLANTED_NOISE], ids=lambda plant: plant.name
)
def test_the_page_says_what_is_planted_where(plant: PlantedChange) -> None:
    where = " ".join(f"`{part}`" for part in (plant.location.part, plant.location.path, plant.location.kind) if part)

    assert (
        f"| {plant.name} | {plant.description} | `{plant.location.endpoint}` | {where} |"
        in (ROOT / "docs/demo.md").read_text()
    )


def test_the_page_lists_nothing_else() -> None:
    rows = re.findall(r"^\| (?!name )([a-z-]*[a-z]) \|", (ROOT / "docs/demo.md").read_text(), re.MULTILINE)

    assert sorted(rows) == sorted(plant.name for plant in (*PLANTED_REGRESSIONS, *PLANTED_ADDITIONS, *PLANTED_NOISE))


def _paths(routes: object) -> set[str]:
    from starlette.routing import Mount, Route

    found: set[str] = set()
    assert isinstance(routes, list)
    for route in routes:
        if isinstance(route, Mount):
            found |= {route.path + path for path in _paths(route.routes)}
        elif isinstance(route, Route):
            found.add(route.path_format)
    return found
