"""The examples run as they stand, each as a process of its own, on the demo model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from foregate.cli.generate import generate_and_report

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo/mixtral-tiny"
PROMPT = "And the LORD said unto Moses,"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(name, *arguments): the example's end, which must be a good one; in an empty folder."""

    def start(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # test processes share the cores
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return start


def test_quick_start_converts_the_demo_model_and_writes_as_transformers_would(run: Run, tmp_path: Path) -> None:
    """But for the rounding to 4 bits: the first words."""
    done = run("quick_start")
    assert (tmp_path / "build/demo.store/foregate.json").is_file()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert done.stdout.startswith(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert len(done.stdout) > len(PROMPT) + 100
    assert re.search(r"[1-9]\d* hits, [1-9]\d* misses, [1-9]\d* MiB read", done.stderr)


def test_pipeline_continues_each_prompt(run: Run, demo_store: Path) -> None:
    lines = run("hf_pipeline", demo_store).stdout.splitlines()
    continuations = {prompt: text for prompt, text in (line.split(" -> ") for line in lines)}
    assert len(continuations) == 3
    assert all(len(text) > 20 for text in continuations.values())


def test_own_policy_writes_the_text_of_lru_with_other_hits(run: Run, demo_store: Path) -> None:
    parts = re.split(r"^(\S+): (\S+)% hits\n", run("own_policy", demo_store).stdout, flags=re.M)
    lru, lru_hits, lru_text, own, own_hits, own_text = parts[1:]
    assert (lru, own) == ("lru", "decayed-frequency")
    assert lru_text == own_text
    assert lru_text.startswith(PROMPT)
    assert 0 < float(own_hits) < 100
    assert own_hits != lru_hits


def test_report_is_read_layer_by_layer(run: Run, demo_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    generate_and_report(demo_store, PROMPT, {"memory": "25%", "threads": 1}, {"max_new_tokens": 12}, path)
    report, printed = json.loads(path.read_text()), run("read_report", path).stdout
    shares = [layer["hits"] / (layer["hits"] + layer["misses"]) for layer in report["by_layer"]]
    assert re.findall(r"^ +(\d+) +(\S+)%", printed, re.M) == [(str(i), f"{100 * s:.1f}") for i, s in enumerate(shares)]
    assert f"prefetches: {report['prefetches']['started']} started" in printed
    assert "24 of 96 experts in memory" in printed


@pytest.mark.slow
def test_lm_eval_task_on_local_data(run: Run, demo_store: Path) -> None:
    """The model knows which of two continuations is in its language."""
    pytest.importorskip("lm_eval")
    assert "accuracy 1.00" in run("lm_eval_task", demo_store).stdout
