"""An lm-eval task on local data: which of two continuations the model finds likelier.

pip install lm_eval
python examples/lm_eval_task.py [STORE]
"""

import json
import sys
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import foregate

QUESTIONS = [
    {"text": "And the LORD said unto Moses,", "choices": [" Speak unto the people", " def read(self):"], "answer": 0},
    {"text": "def __init__(self", "choices": [" und das Haus", ", name):\n"], "answer": 1},
    {"text": "Debian ist ein freies", "choices": [" Betriebssystem", " unto Moses"], "answer": 0},
    {"text": "apt-get install", "choices": [" children of Israel", " package"], "answer": 1},
]

store = sys.argv[1] if len(sys.argv) > 1 else "build/demo.store"
with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": folder},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    model = foregate.load(store, memory="25%")
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(store), batch_size=1, add_bos_token=True)
    results = simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0)
print(f"accuracy {results['results']['local_choice']['acc,none']:.2f}")
