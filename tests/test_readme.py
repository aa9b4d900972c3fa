"""The README's commands and code work as they stand there."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_convert_generate_and_python_as_written(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoint("mixtral"), tmp_path / "path/to/checkpoint")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(BIN)
    commands = next(block for block in blocks("sh") if "convert path/to/checkpoint" in block)
    done = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout
    assert "tokens/s" in done.stderr
    script = tmp_path / "quick.py"
    script.write_text(blocks("python")[0])
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout
    assert "hits=" in done.stdout


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for block in blocks("sh") for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_paths_in_the_docs_exist() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_annotated_tree_names_what_is_there() -> None:
    tree = next(block for block in README.split("```") if block.startswith("\nsrc/foregate/"))
    named = set(re.findall(r"^  (\w+(?:/|\.py))", tree, re.MULTILINE))
    package = ROOT / "src/foregate"
    there = {p.name + "/" if p.is_dir() else p.name for p in package.iterdir() if p.name[0] not in "._"}
    assert named <= there
    assert {name for name in there if name.endswith("/")} <= named
