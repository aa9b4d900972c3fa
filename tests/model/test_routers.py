"""Routers of many families against the families' own forward pass."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import PRESENT
from torch import nn
from transformers import PreTrainedModel

import foregate
from foregate.errors import ForegateError
from foregate.lookahead.record import observed
from foregate.model.routers import Router, find_routers, normalized, router_input

Folder = Callable[[str], Path]
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(3))

# Families of different kinds; the rest are slow tests.
QUICK = (
    "mixtral",
    "qwen3_next",  # zero-centred norm
    "deepseek_v3",  # dense first layer, grouped routing
    "deepseek_v4",  # hash routing: transformers does not record these routers
    "gpt_oss",  # bias
    "minimax_m2",  # the router is called with more than the hidden states
    "phimoe",  # no RMS norm, the router is a linear layer itself
    "muse_spark",  # scaled logits, experts in a narrower space
    "gemma4",  # norm inside the router, probabilities instead of logits, experts with an input of their own
    "zaya",  # a network as a router, an entry for "none"
    "nemotron_h",
    "jamba",
)
FAMILIES = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in PRESENT]
NO_WEIGHT = {"gemma4", "gemma4_text", "zaya"}
NO_GAIN = {"gemma4", "gemma4_text", "phimoe", "cohere2_moe", "flex_olmo", "axk2", "qwen4_exp", "qwen4_exp_text"}
OWN_INPUT = {"gemma4", "gemma4_text", "muse_spark"}


@pytest.fixture
def loaded(store: Folder) -> Iterator[Callable[[str], PreTrainedModel]]:
    """loaded(family): a tiny model that runs from its store."""
    models: list[PreTrainedModel] = []

    def load(family: str) -> PreTrainedModel:
        models.append(foregate.load(store(family), memory="100%"))
        return models[-1]

    yield load
    for model in models:
        model.foregate.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_explain_what_a_forward_pass_shows(family: str, loaded: Callable[[str], PreTrainedModel]) -> None:
    model = loaded(family)
    layers = model.foregate.store.layers
    routers = find_routers(model, layers)
    assert not model.foregate.recorder.totals().misses  # finding them read no expert
    seen = watch(model, routers)
    for index, (layer, router) in enumerate(zip(layers, routers, strict=True)):
        truth, columns = seen[index], seen[index]["columns"]
        scores = router.scores(truth["output"]).float()
        assert scores.shape[1] == router.scores_size >= layer.num_experts
        assert torch.equal(columns["scores"], scores.to(torch.bfloat16))
        assert torch.equal(columns["inputs"], truth["input"].to(torch.bfloat16))
        assert torch.equal(columns["chosen"], truth["chosen"].to(torch.int16))
        assert router.top_k == layer.top_k == truth["chosen"].shape[1]
        assert ("experts" in columns) == (not router.shares_input) == (family in OWN_INPUT)
        experts_input = columns.get("experts", columns["inputs"])
        assert torch.equal(experts_input, truth["hidden"].to(torch.bfloat16))
        assert not any(t.is_inference() for t in (router.weight, router.bias, router.gain) if t is not None)
        check_weight(router, truth["input"], scores, expected=family not in NO_WEIGHT)
        check_gain(router, truth["input"], truth["outputs"], expected=family not in NO_GAIN)


def test_probabilities_become_logits(loaded: Callable[[str], PreTrainedModel]) -> None:
    model = loaded("gemma4")
    routers = find_routers(model, model.foregate.store.layers)
    for seen, router in zip(watch(model, routers), routers, strict=True):
        assert router.gives_probabilities
        torch.testing.assert_close(router.scores(seen["output"]).softmax(-1), seen["output"][0])


def test_a_router_that_cannot_be_found_is_named(loaded: Callable[[str], PreTrainedModel]) -> None:
    """transformers names no router class and the choice is made by nobody who returns it."""
    model = loaded("mixtral")
    model.model._can_record_outputs = model._can_record_outputs = {}
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: (args[0], args[1].flip(-1), args[2]))
    with pytest.raises(
        ForegateError, match=r"MixtralForCausalLM .* router of model.layers.0.mlp.experts was not found"
    ):
        find_routers(model, model.foregate.store.layers)


def watch(model: PreTrainedModel, routers: tuple[Router, ...]) -> list[dict[str, Any]]:
    """What the layers' routers and experts saw in one pass, by plain hooks, beside the columns of a trace."""
    seen: list[dict[str, Any]] = [{} for _ in routers]
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (input, output) of every simple module, as they ran

    def note_output(module: nn.Module, args: tuple, output: Any) -> None:
        if len(args) == 1 and isinstance(output, torch.Tensor) and output.shape == getattr(args[0], "shape", None):
            outputs.append((args[0].clone(), output.clone()))

    def note_router(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            hidden = router_input(args, kwargs)
            seen[index] |= {"input": hidden.reshape(-1, hidden.shape[-1]).clone(), "output": output}
            seen[index]["outputs"] = outputs.copy()
            outputs.clear()

        return hook

    engine = model.foregate
    run_layer = engine.run_layer

    def note_call(layer: int, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen[layer] |= {"hidden": hidden.clone(), "chosen": chosen.clone()}
        return run_layer(layer, hidden, chosen, weights)

    handles = [module.register_forward_hook(note_output) for module in model.modules()]
    for index, router in enumerate(routers):
        handles.append(router.module.register_forward_hook(note_router(index), with_kwargs=True))
    engine.run_layer = note_call
    modules = [layer.module for layer in engine.store.layers]

    def note_columns(index: int, columns: dict[str, torch.Tensor]) -> None:
        seen[index]["columns"] = columns

    with observed(model, modules, routers, note_columns), torch.inference_mode():
        model(input_ids=IDS)
    del engine.run_layer
    for handle in handles:
        handle.remove()
    return seen


def check_weight(router: Router, hidden: torch.Tensor, scores: torch.Tensor, expected: bool) -> None:
    assert (router.weight is not None) == expected
    if router.weight is not None:
        bias = 0 if router.bias is None else router.bias
        torch.testing.assert_close(hidden.float() @ router.weight.T + bias, scores, rtol=1e-4, atol=1e-5)


def check_gain(
    router: Router, hidden: torch.Tensor, outputs: list[tuple[torch.Tensor, torch.Tensor]], expected: bool
) -> None:
    assert (router.gain is not None) == expected
    if router.gain is not None:
        before = [x for x, y in outputs if y.numel() == hidden.numel() and torch.equal(y.reshape(hidden.shape), hidden)]
        found = [normalized(x.reshape(hidden.shape)) * router.gain for x in before]
        assert any(torch.allclose(made, hidden, rtol=5e-3, atol=5e-3) for made in found)
