"""docs/cli.md matches the commands."""

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
DOCUMENTED_ELSEWHERE = {"collector", "up", "demo", "sidecar", "migrate", "envoy render", "envoy validate"}


def list_commands() -> dict[str, click.Command]:
    """Return the commands by their full name, without groups that only have subcommands."""
    commands: dict[str, click.Command] = {}
    with click.Context(abreast) as context:
        for name in COMMANDS:
            command = abreast.get_command(context, name)
            assert command is not None
            if not isinstance(command, click.Group) or command.invoke_without_command:
                commands[name] = command
            if isinstance(command, click.Group):
                commands |= {f"{name} {sub}": inner for sub, inner in command.commands.items()}
    return commands


def list_options(command: click.Command) -> set[str]:
    return {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}


def test_docs_have_a_section_and_example_for_every_command() -> None:
    assert set(SECTIONS) == set(list_commands())
    assert all(f"$ abreast {name}" in text for name, text in SECTIONS.items())


def test_commands_that_show_data_print_json() -> None:
    without = {name for name, command in list_commands().items() if "--json" not in list_options(command)}

    assert without == {
        *("up", "sidecar", "collector", "migrate", "report", "key rotate", "completion"),  # start, or write files
        *(
            "config check",
            "config schema",
            "envoy render",
            "envoy validate",
            "rules check",
            "rules export",
            "rules schema",
        ),
    }


@pytest.mark.parametrize("name", SECTIONS)
def test_docs_sections_name_exactly_the_options(name: str) -> None:
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", SECTIONS[name]))
    real = list_options(list_commands()[name])

    assert options <= real
    assert name in DOCUMENTED_ELSEWHERE or options == real


@pytest.mark.parametrize("line", EXAMPLES)
def test_docs_examples_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("ABREAST_SIDECAR", "127.0.0.1:50051")  # whatever stacks run on this machine
    words = shlex.split(line)
    commands = list_commands()
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in commands)
    context = commands[name].make_context(name, words[len(name.split()) :])

    assert context.command is commands[name]


def test_docs_table_of_exit_codes_matches() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.MULTILINE))

    assert {int(code): text.replace("\\|", "|") for code, text in table.items()} == {
        int(k): v for k, v in EXIT_MEANINGS.items()
    }
