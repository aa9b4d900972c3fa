"""lm-eval's Hugging Face wrapper takes the loaded model as it is (`make test-slow` installs lm-eval)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import foregate

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")
PAIRS = [("In the", " beginning"), ("God created", " the heaven"), ("x", "yz")]


def test_same_scores_as_the_original(checkpoint: Callable[[str], Path], store: Callable[[str], Path]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(store("mixtral"))
    tokenizer.eos_token = tokenizer.pad_token = "~"
    models = (
        foregate.load(store("mixtral"), memory="25%"),
        AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32),
    )
    results = []
    for model in models:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128)
        scores = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in PAIRS])
        until = ("In the", {"until": ["\n"], "max_gen_toks": 8})
        texts = harness.generate_until([Instance("generate_until", {}, until, 0)])
        rolling = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("hello world",), 0)])
        results.append(([score for score, _ in scores] + rolling, texts))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
    assert results[0][1] == results[1][1]
