"""What a pass needs, told without data, is what a real one holds."""

import pytest
import torch
from families import tiny_config
from transformers import CONFIG_MAPPING, PretrainedConfig

from foregate.checkpoint.architecture import auto_class, inspect_architecture
from foregate.memory import footprint as module
from foregate.memory.footprint import Footprint, footprint

PROMPT, NEW = 6, 27
CONTEXT = PROMPT + NEW - 1  # the last token is not taken in


def found(family: str, context: int = CONTEXT, prompt: int = PROMPT, sequences: int = 1) -> Footprint:
    return footprint(inspect_architecture(tiny_config(family)), context, prompt, torch.float32, sequences)


def cache_bytes(cache: object, seen: set[int]) -> int:
    """All tensors anywhere in a cache, each once."""
    if isinstance(cache, torch.Tensor):
        return 0 if id(cache) in seen or seen.add(id(cache)) else cache.nbytes
    if isinstance(cache, (PretrainedConfig, str, int, float, bool, type(None), torch.dtype)):
        return 0
    parts = cache.values() if isinstance(cache, dict) else cache if isinstance(cache, (list, tuple)) else None
    if parts is None:
        parts = vars(cache).values() if hasattr(cache, "__dict__") and id(cache) not in seen else ()
        seen.add(id(cache))
    return sum(cache_bytes(part, seen) for part in parts)


@pytest.mark.parametrize(
    "family",
    ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba", "lfm2_moe", "gemma4", "minimax", "granitemoehybrid"],
)
def test_kv_cache_and_states_are_those_of_a_real_run(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    config = tiny_config(family)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        run = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    planned, held = found(family), cache_bytes(run.past_key_values, set())
    assert planned.exact
    assert held <= planned.kv_cache <= 1.1 * held  # after a prompt a sliding window holds on to some more


def test_a_cache_of_keys_and_values_by_hand() -> None:
    config = tiny_config("mixtral")
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * (64 // 4) * 4  # float32
    assert found("mixtral", 1000, 8).kv_cache == 1000 * token
    assert found("mixtral", 100, 8, sequences=5).kv_cache == 500 * token
    half = footprint(inspect_architecture(config), 1000, 8, torch.bfloat16)
    assert half.kv_cache == 500 * token


def test_transients_grow_with_the_prompt_and_hold_the_experts_results() -> None:
    short, long = found("mixtral", 600, 64).transients, found("mixtral", 600, 512).transients
    outputs = 512 * 2 * 64 * 4  # tokens, top-k, hidden, float32
    assert long > outputs
    assert 4 < long / short < 10


def test_attention_that_is_not_fused_holds_its_scores() -> None:
    scores = 4 * 512 * 600 * 4  # heads, tokens of the pass, all tokens, float32; gpt-oss has no fused attention
    assert found("gpt_oss", 600, 512).transients > 2 * scores
    assert found("mixtral", 600, 512).transients < scores


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
def test_long_prompts_of_recurrent_layers_are_extrapolated(family: str) -> None:
    model = inspect_architecture(tiny_config(family))
    line = found(family, 400, 100)
    with module._no_experts(model), torch.inference_mode():
        real = module._measure(model.model.to(torch.float32).eval(), 300, 100)
    assert line.kv_cache == real.kv_cache
    assert real.transients == pytest.approx(line.transients, rel=0.25)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_what_cannot_be_told_is_estimated_on_the_safe_side(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = found(family, 300, 50, 2)

    def fail(*args: object) -> Footprint:
        raise NotImplementedError("this family asks for values")

    monkeypatch.setattr(module, "_sessions", fail)
    estimated = found(family, 300, 50, 2)
    assert exact.exact and not estimated.exact
    assert estimated.kv_cache >= exact.kv_cache
    assert estimated.transients >= exact.transients
