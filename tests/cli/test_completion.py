"""What the shells complete: the real scripts, and real bash running the one for bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foregate.cli import completion
from foregate.cli.completion import DEVICE_NAMES, KERNEL_NAMES
from foregate.kernels import AUTO, KERNELS, slots
from foregate.memory import devices

FOREGATE = Path(sys.executable).parent / "foregate"


def test_kernels_and_devices_are_those_there_are() -> None:
    assert set(KERNEL_NAMES) == {AUTO, *KERNELS, *slots.NAMES}
    assert set(DEVICE_NAMES) == set(devices.NAMES)


def test_models_are_folders_that_hold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, file in {"a.store": "foregate.json", "a-checkpoint": "config.json", "ab": "x", ".hidden": "x"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    (tmp_path / "afile").touch()
    monkeypatch.chdir(tmp_path)
    assert completion.models("a") == ["a-checkpoint", "a.store", "ab/"]
    assert completion.models("") == ["a-checkpoint", "a.store", "ab/"]
    assert completion.models(f"{tmp_path}/a.") == [f"{tmp_path}/a.store"]
    assert completion.models("nowhere/x") == []
    assert completion.models(".h") == [".hidden/"]


def test_in_bash(tmp_path: Path) -> None:
    (tmp_path / "model.store").mkdir()
    (tmp_path / "model.store/foregate.json").touch()
    script = f"""
        PATH={FOREGATE.parent}:$PATH
        source <({FOREGATE} --show-completion)
        try() {{
            COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
            _foregate_completion foregate
            echo "${{COMPREPLY[@]}}"
        }}
        try foregate ev
        try foregate generate --policy l
        try foregate chat --kernel c
        try foregate generate mo
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["evaluate evaluate-gates", "lru lookahead", "cpu", "model.store"]


def test_for_zsh_and_fish() -> None:
    for shell, words in (("zsh", "foregate generate --kernel "), ("fish", "foregate generate --kernel ")):
        variables = {
            "_FOREGATE_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": words,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        done = subprocess.run([FOREGATE], env={**os.environ, **variables}, capture_output=True, text=True)
        assert all(name in done.stdout for name in KERNEL_NAMES), done.stderr


def test_installing_it(tmp_path: Path) -> None:
    command = ["bash", "-c", f"{FOREGATE} --install-completion; true"]
    done = subprocess.run(command, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert "bash completion installed" in done.stdout, done.stderr
    assert "foregate" in (tmp_path / ".bashrc").read_text()
