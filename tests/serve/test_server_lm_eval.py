"""lm-eval's OpenAI client against the server, on a small local task (`make test-slow` installs lm-eval)."""

import json
from pathlib import Path
from typing import Any

import pytest
from live_server import MOSES, Live

import foregate

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")
DOCS = [
    {"text": MOSES, "choices": [" Speak unto the people", " def read(self):"], "answer": 0},
    {"text": "def __init__(self", "choices": [" und das Haus", ", name):\n"], "answer": 1},
    {"text": "Debian ist ein freies", "choices": [" Betriebssystem", " unto Moses"], "answer": 0},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def evaluate(folder: Path, model: Any, **options: Any) -> tuple[float, list[float]]:
    """Accuracy, and the log-likelihood of every choice."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=["local_choice"], task_manager=tasks, bootstrap_iters=0, **options)
    samples = sorted(results["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    likelihoods = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    return results["results"]["local_choice"]["acc,none"], likelihoods


def test_a_local_task_scores_as_on_the_model_itself(
    live: Live, demo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    arguments = {
        "model": "demo",
        "base_url": f"{live.url}/v1/completions",
        "tokenizer": str(demo_store),
        "num_concurrent": 4,
        "max_length": 1024,
        "add_bos_token": True,
    }
    served = evaluate(tmp_path, "local-completions", model_args=arguments)
    model = foregate.load(demo_store, memory="25%", threads=1)
    tokenizer = live.service.encoder.tokenizer
    direct = evaluate(tmp_path, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=True))
    model.foregate.close()
    assert served[0] == direct[0] == 1.0
    assert served[1] == pytest.approx(direct[1], abs=1e-2)
