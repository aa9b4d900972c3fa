"""What a command may be given as its model, and how a checkpoint becomes a store on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from foregate.checkpoint.store import Store

SHORT = ("--prompt", "hello", "--max-new-tokens", 3, "--threads", 1)
Run = Callable[..., str]


def test_a_checkpoint_without_a_terminal_needs_yes(
    fails: Run, prints: Run, checkpoint: Callable[[str], Path], cache: Path
) -> None:
    model = checkpoint("mixtral")
    error = fails("generate", model, *SHORT)
    assert "to be converted once, to 4 bits: add --yes" in error
    assert f"foregate convert {model} DST" in error
    assert not cache.exists()
    text = prints("generate", model, *SHORT, "--yes")
    (store,) = cache.iterdir()
    assert Store(store).manifest.bits == 4
    assert text == prints("generate", model, *SHORT) == prints("generate", store, *SHORT)
    assert json.loads(prints("generate", model, *SHORT, "--yes", "--bits", 8, "--json"))["model"]["bits"] == 8
    assert len(list(cache.iterdir())) == 2


def test_at_a_terminal_it_is_asked(terminal: Callable, checkpoint: Callable[[str], Path], cache: Path) -> None:
    person = terminal("generate", checkpoint("mixtral"), *SHORT)
    question = person.expect(r"Go on\? \[Y/n\]: ")
    assert "is a checkpoint of 2.0 MiB, to be converted once, to 4 bits" in question
    assert str(cache) in question
    assert "FOREGATE_CACHE" in question
    person.type("n\n")
    assert person.wait() == 2
    assert "nothing was converted" in person.seen
    assert not cache.exists()
    person = terminal("generate", checkpoint("mixtral"), *SHORT)
    person.expect(r"Go on\? \[Y/n\]: ")
    person.type("\n")
    assert person.wait() == 0
    assert "hello" in person.seen
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("evaluate", ["--text", "{text}", "--json"]),
        ("trace", ["--text", "{text}", "--out", "{out}"]),
        ("align", ["--text", "{text}", "--window", "32"]),
        ("evaluate-gates", ["--text", "{text}", "--window", "32", "--json"]),
        ("chat", []),
        ("serve", []),
        ("bench policies", ["--memory", "50%"]),
        ("bench validate", ["--memory", "50%"]),
    ],
)
def test_every_command_takes_one(
    fails: Run, checkpoint: Callable[[str], Path], cache: Path, tmp_path: Path, command: str, rest: list[str]
) -> None:
    (tmp_path / "text.txt").write_text("And God said, Let there be light. " * 8)
    given = [part.format(text=tmp_path / "text.txt", out=tmp_path / "out") for part in rest]
    assert "add --yes" in fails(*command.split(), checkpoint("mixtral"), *given)


def test_what_is_no_model(fails: Run, store: Callable[[str], Path], tmp_path: Path, cache: Path) -> None:
    assert "no such store or checkpoint" in fails("generate", tmp_path / "nowhere", *SHORT)
    assert "is neither a store (no foregate.json) nor a checkpoint" in fails("generate", tmp_path, *SHORT)
    assert "as a hub id it would be downloaded" in fails("generate", "someone/nothing", *SHORT)
    assert "nor could it be downloaded as a hub id" in fails("generate", "someone/nothing", *SHORT, "--yes")
    assert "is a store of 16 bits: leave --bits out" in fails("generate", store("mixtral"), *SHORT, "--bits", 4)
    assert not cache.exists()
