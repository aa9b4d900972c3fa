"""What README and docs say to type works: commands run as they stand there, or are at least what the command line knows."""

import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from foregate.cli.main import app
from foregate.kernels import KERNELS
from foregate.schedule import POLICIES

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
ONLY_CHECKED = {  # what marks a command that is parsed here and not run -> why
    **dict.fromkeys(("allenai/", "Qwen/", "mistralai/"), "a download of gigabytes"),
    **dict.fromkeys(("olmoe.store", "qwen3.store", "mixtral.store"), "what became of one, or hours of training"),
    **dict.fromkeys(("inflate", "convert big", "convert mixtral-big"), "gigabytes on disk; tests/checkpoint"),
    "bench": "minutes; tests/bench",
    "plot run.json": "docs/report.md draws one that it made",
    "--device cuda": "a card; benchmarks/gpu_kernels.py",
    "serve": "until it is stopped; tests/serve",
    "path/to/checkpoint": "tests/test_readme.py",
    "--prompt 'Once upon a time'": "tests/test_readme.py",
}
OTHERS = re.compile(r"(source|git|make|curl|hf) ")  # tests/test_readme.py, tests/serve


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def lines(page: str) -> list[list[str]]:
    """The commands in a page's blocks, word by word, without variables before them and `...` within."""
    joined = "".join(fences(page, "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [[w for i, w in enumerate(line) if w != "..." and not (i == 0 and "=" in w)] for line in words if line]


def foregate_lines(page: str) -> list[list[str]]:
    """The arguments of a page's `foregate` commands."""
    return [words[1:] for words in lines(page) if Path(words[0]).name == "foregate"]


def redirected(words: list[str]) -> tuple[list[str], str | None]:
    """A command without its `> FILE`, and the file."""
    return (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the arguments left for it."""
    command, rest = get_command(app), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    return command, rest


def options_of(command: Any) -> set[str]:
    return {name for param in command.params for name in param.opts} | {"--help"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_what_the_command_line_takes(page: str) -> None:
    for words in foregate_lines(page):
        command, rest = find_command(redirected(words)[0])
        command.make_context(words[0], rest)  # fails on unknown options, wrong types, missing arguments


def given(words: list[str]) -> dict[str, str]:
    """The options of a command that take a value."""
    return {word: after for word, after in pairwise(words) if word.startswith("--")}


@pytest.mark.parametrize(("page", "models"), [("README.md", 1), ("docs/first-model.md", 4)])
def test_what_is_planned_is_what_is_converted_and_run(page: str, models: int) -> None:
    """plan MODEL, convert MODEL STORE and generate STORE follow each other with the same bits and memory."""
    commands = foregate_lines(page)
    triples = [triple for triple in zip(commands, commands[1:], commands[2:], strict=False) if triple[0][0] == "plan"]
    assert len(triples) == models
    for plan, convert, generate in triples:
        assert (convert[:2], generate[:2]) == (["convert", plan[1]], ["generate", convert[2]])
        planned, run = given(plan), given(generate)
        assert {name: planned[name] for name in ("--bits", "--backbone-bits")} == given(convert)
        for name in ("--memory", "--host-memory", "--device"):
            assert planned.get(name) == run.get(name), f"{name} of {plan[1]}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist_with_their_options(page: str) -> None:
    for text in re.findall(r"`(?:\.venv/bin/)?foregate ([^`]+)`", PAGES[page]):
        words = text.split()
        if words[0] != "COMMAND":
            command, rest = find_command(words)
            named = {word for word in rest if word.startswith("--")}
            assert named <= options_of(command), f"foregate {text}"


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_name_what_is_there(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in lines(page):
        line = " ".join(words)
        if Path(words[0]).name == "foregate" or OTHERS.match(line):
            continue
        if "pytest" in words:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), line
        elif "pip" in words[:3]:
            assert set(re.findall(r"\[(\w+)\]", line)) <= extras.keys(), line
        else:
            assert words[0] == "python", f"nothing here knows the command: {line}"
            script = ROOT / words[1]
            source = "".join(file.read_text() for file in (script, *script.parent.glob("*/arguments.py")))
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), line


def runnable(page: str) -> list[list[str]]:
    return [words for words in foregate_lines(page) if not any(mark in shlex.join(words) for mark in ONLY_CHECKED)]


def test_few_commands_are_only_checked() -> None:
    everything = [shlex.join(words) for page in PAGES for words in foregate_lines(page)]
    assert all(any(mark in line for line in everything) for mark in ONLY_CHECKED), "a mark that marks nothing"
    assert sum(len(runnable(page)) for page in PAGES) >= 10


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with some of what the pages' commands name: checkpoints, this project's tests."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "SRC").symlink_to(ROOT / "demo/mixtral-tiny")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide(folder: Path, commands: list[list[str]], trace: Path) -> None:
    """The texts and traces that commands read. If one of them writes a trace, the others are that one, else `trace`."""
    written = [after for words in commands for word, after in pairwise(words) if word == "--out"]
    for name in {word for words in commands for word in words} - set(written):
        if name.endswith(".txt"):
            kind = "python" if name.startswith("b") else "bible"
            (folder / name).write_text((ROOT / f"demo/text/{kind}.txt").read_text()[:3000])
        elif name.endswith(".trace"):
            (folder / name).symlink_to(folder / written[0] if written else trace)


TRAINING = ("docs/gates.md", "docs/cli.md")  # on a model that is smaller still
SLOW = (*TRAINING, "docs/benchmarks.md", "docs/report.md", "docs/device.md")  # other tests do the same in less time


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if runnable(page)],
)
def test_commands_run(
    page: str, workshop: Path, demo_store: Path, demo_trace: Path, store: Callable[[str], Path]
) -> None:
    """In the page's order, in one folder."""
    commands = runnable(page)
    if any("--plot" in words for words in commands):
        pytest.importorskip("matplotlib")
    shutil.copytree(store("mixtral") if page in TRAINING else demo_store, workshop / "model.store")
    config = workshop / "model.store/config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "max_position_embeddings": 1024}))  # windows are of 512 tokens
    (workshop / "demo.store").symlink_to(demo_store)
    provide(workshop, commands, demo_trace)
    for line in commands:
        words, output = redirected(line)
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        if output:
            Path(output).write_text(done.stdout)
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}"
        for word, after in pairwise(words):
            assert word not in ("--out", "--json", "--plot") or (workshop / after).exists()


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Policies, kernels and import path are after the test what they were."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    registries = [(registry, dict(registry)) for registry in (POLICIES, KERNELS)]
    yield
    for registry, before in registries:
        registry.clear()
        registry.update(before)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("page", ["docs/policies.md", "docs/kernels.md"])
def test_python_runs(
    page: str, workshop: Path, demo_store: Path, demo_trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page's blocks one after the other, as one program."""
    (workshop / "model.store").symlink_to(demo_store)
    (workshop / "held-out.trace").symlink_to(demo_trace)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in fences(page, "python"):
        exec(compile(block, page, "exec"), names)
    if page == "docs/policies.md":
        printed = re.findall(r"^(\S+) protect-expected: (\S+) tokens/s", capsys.readouterr().out, re.MULTILINE)
        assert [memory for memory, _ in printed] == ["25%", "50%"]
        assert all(float(speed) > 0 for _, speed in printed)


def test_troubleshooting_quotes_what_the_program_says() -> None:
    """Every line in code style, up to where names and numbers stand, is in the sources, options and files apart."""
    files = [*ROOT.glob("src/foregate/**/*.py"), *ROOT.glob("src/foregate/native/*.cpp")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))  # strings that go on
    rows = re.findall(r"^\| (.*?) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    quoted = [part.strip() for row in rows for text in re.findall(r"`([^`]+)`", row) for part in text.split("…")]
    missing = [part for part in quoted if len(part) > 3 and part not in source]
    assert len(quoted) > 60
    assert not missing
