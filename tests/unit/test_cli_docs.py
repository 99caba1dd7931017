"""docs/cli.md and the commands agree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from abreast_sidecar.cli import COMMANDS, abreast
from abreast_sidecar.cli.exit_codes import EXIT_MEANINGS

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
SECTIONS = dict(re.findall(r"^### `abreast ([^`]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
EXAMPLES = re.findall(r"^\$ abreast (.+)$", PAGE, re.MULTILINE)
ELSEWHERE = {"demo", "sidecar", "migrate", "envoy render", "envoy validate"}  # pages of their own name the options


def commands() -> dict[str, click.Command]:
    """By the words that call them; a group that does nothing by itself is left out."""
    found: dict[str, click.Command] = {}
    with click.Context(abreast) as context:
        for name in COMMANDS:
            command = abreast.get_command(context, name)
            assert command is not None
            if not isinstance(command, click.Group) or command.invoke_without_command:
                found[name] = command
            if isinstance(command, click.Group):
                found |= {f"{name} {sub}": inner for sub, inner in command.commands.items()}
    return found


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}


def test_every_command_has_a_section_with_an_example() -> None:
    assert set(SECTIONS) == set(commands())
    assert all(f"$ abreast {name}" in text for name, text in SECTIONS.items())


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_name_the_options_that_exist(name: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", SECTIONS[name]))
    real = options(commands()[name])

    assert named <= real
    assert name in ELSEWHERE or named == real


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    words = shlex.split(line)
    known = commands()
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in known)
    context = known[name].make_context(name, words[len(name.split()) :])

    assert context.command is known[name]


def test_the_table_of_exit_codes_is_the_real_one() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.MULTILINE))

    assert {int(code): text.replace("\\|", "|") for code, text in table.items()} == {
        int(k): v for k, v in EXIT_MEANINGS.items()
    }
