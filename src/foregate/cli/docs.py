"""docs/cli.md, written from the commands themselves: python -m foregate.cli.docs > docs/cli.md"""

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from foregate.cli.main import EXIT_CODES, PANELS, app
from foregate.cli.options import example_line
from foregate.config import CacheConfig

INTRO = f"""# Commands

This page is written by `make docs` from the commands' own help; a test compares the two.

**Models.** Where a command takes a `MODEL`, that is a store, a checkpoint folder or a hub id. A checkpoint is converted on
first use, at {CacheConfig.bits} bits unless `--bits` says otherwise, after a question at the terminal or with `--yes`; a hub
id is downloaded first. Stores made so lie in `$FOREGATE_CACHE/stores`, else in `~/.cache/foregate/stores`, under a name that
changes with the checkpoint's files; remove what is no longer needed. An interrupted conversion goes on the next time.

**For programs.** `--json` prints JSON on stdout instead of text for people, `--report FILE` writes the same into a file. Text
for people about a run, questions and errors go to stderr. There are no colours where output is not a terminal, nor with
`NO_COLOR` set.

{EXIT_CODES}"""


def reference() -> str:
    """The whole page, as Markdown."""
    commands = get_command(app).commands
    lines = [INTRO]
    for panel, modules in PANELS.items():
        lines += ["", f"## {panel}"]
        for module in modules:
            lines += _describe(f"foregate {module.NAME}", commands[module.NAME])
    return "\n".join(lines) + "\n"


def _describe(name: str, command: Any) -> Iterator[str]:
    yield from ("", f"### {name}", "", command.help.strip())
    if subcommands := getattr(command, "commands", None):
        for subname, subcommand in subcommands.items():
            yield from _describe(f"{name} {subname}", subcommand)
        return
    yield from ("", "```sh", command.epilog.removeprefix(example_line("")), "```", "")
    yield from ("| | default | |", "|---|---|---|")
    for param in command.params:
        if param.name != "help":
            yield f"| {_name(param)} | {_default(param)} | {_cell(param.help)} |"


def _name(param: Any) -> str:
    """As it is typed: `MODEL`, `--memory SIZE`, `--yes`, `-y`."""
    if param.param_type_name == "argument":
        return f"`{param.metavar}`"
    names = [f"`{option}`" for option in param.opts]
    if not param.is_flag:
        names[0] = f"{names[0][:-1]} {_cell(param.metavar)}`"
    return ", ".join(names)


def _default(param: Any) -> str:
    if param.required:
        return "*required*"
    if param.default in (None, (), []) or getattr(param, "is_flag", False):
        return ""
    values = param.default if isinstance(param.default, list | tuple) else [param.default]
    return ", ".join(f"`{value}`" for value in values)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
