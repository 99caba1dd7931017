"""Colours of the page: texts and tags have the contrast of WCAG AA in light and in dark."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

MIN_CONTRAST = 4.5
TAG_SHARE = 0.12  # of the colour of a tag in its background
STYLE = (files("abreast_sidecar.serve") / "templates" / "style.css").read_text()
THEMES = [
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
]
Colour = list[float]


def parse_colour(text: str) -> Colour:
    return [int(text[start : start + 2], 16) / 255 for start in (1, 3, 5)]


def measure_luminance(colour: Colour) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def measure_contrast(one: Colour, other: Colour) -> float:
    low, high = sorted((measure_luminance(one), measure_luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["ground", "panel"])
def test_texts_and_tags_have_contrast(theme: dict[str, str], ground: str) -> None:
    behind = parse_colour(theme[ground])
    for name in ("text", "quiet", "link", "good", "bad", "warn", "calm"):
        colour = parse_colour(theme[name])
        tag = [TAG_SHARE * value + (1 - TAG_SHARE) * other for value, other in zip(colour, behind, strict=True)]

        assert measure_contrast(colour, behind) >= MIN_CONTRAST, name
        assert name in {"text", "quiet", "link"} or measure_contrast(colour, tag) >= MIN_CONTRAST, name


def test_keyboard_focus_is_visible() -> None:
    assert "outline: 2px" in re.findall(r":focus-visible \{(.*?)\}", STYLE)[0]
    assert not re.findall(r"outline: (?:none|0)", STYLE)


def test_links_in_texts_do_not_depend_on_colour() -> None:
    assert "text-decoration: underline" in re.findall(r"^main a \{(.*?)\}", STYLE, re.MULTILINE)[0]
