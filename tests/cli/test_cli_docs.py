"""docs/cli.md and the commands' help: one is written from the other, and both teach by examples that parse."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from foregate.cli.docs import reference
from foregate.cli.main import PANELS, app

PAGE = Path(__file__).parents[2] / "docs/cli.md"
EXAMPLES = re.findall(r"```sh\n(.*?)\n```", reference())


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "run make docs"


def test_every_command_is_there_with_an_example() -> None:
    group = get_command(app)
    assert {module.NAME for modules in PANELS.values() for module in modules} == set(group.commands)
    names = [*group.commands, *(f"bench {name}" for name in group.commands["bench"].commands)]
    names.remove("bench")
    assert sorted(names) == sorted(name for example in EXAMPLES if (name := command_of(example)))


def command_of(example: str) -> str:
    words = shlex.split(example)[1:]
    return " ".join(words[: 2 if words[0] == "bench" else 1])


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    """Whether an option that an example uses exists, and none that it needs is missing."""
    words = shlex.split(example)
    assert words[0] == "foregate"
    command, rest = get_command(app), words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context("example", rest)


def test_every_option_has_help() -> None:
    rows = re.findall(r"^\| (.+?) \| (.*?) \| (.*) \|$", reference(), re.MULTILINE)
    assert len(rows) > 100
    assert [row for row in rows if not row[2].strip()] == []
