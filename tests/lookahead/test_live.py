"""The lookahead policy: it needs gates that fit, listens to them, and never changes a model's output."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import foregate
from foregate.checkpoint.source import GATES_FILE
from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.lookahead.gate import Target
from foregate.lookahead.gates import GateLayer, GatesHeader, LookaheadGates
from foregate.lookahead.record import observed
from foregate.lookahead.untrained import untrained_of_model
from foregate.model.routers import find_routers
from foregate.schedule import Prediction

Folder = Callable[[str], Path]


def with_gates(store: Path, folder: Path, input_size: int | None = None) -> Path:
    """A copy of the store with random gates; other layers' routers are trained elsewhere."""
    copied = Path(shutil.copytree(store, folder / "store"))
    opened = foregate.load(copied)
    layers = tuple(
        GateLayer(n.module, n.num_experts, n.top_k, input_size or opened.config.get_text_config().hidden_size)
        for n in opened.foregate.store.layers
    )
    header = GatesHeader(layers, opened.config.get_text_config().hidden_size, 2, 4, {})
    torch.manual_seed(0)
    gates = [header.new_gate(source) for source in range(len(layers) + 1)]
    for gate in gates:
        for parameter in gate.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.1
    LookaheadGates(header, gates).save(copied / GATES_FILE)
    return copied


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_output_is_that_of_lru_whatever_the_gates_say(store: Folder, family: str, tmp_path: Path) -> None:
    copied, prompt = with_gates(store(family), tmp_path), torch.arange(3, 15)[None]
    texts, listened = [], []
    for policy in ("lru", "lookahead"):
        model = foregate.load(copied, memory="30%", policy=policy)
        texts.append(model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0))
        listened.append(model.foregate.scheduler.facts().get("tokens", 0))
    assert torch.equal(*texts)
    assert listened == [0, 12]


def test_without_gates_only_the_lookahead_policy_complains(store: Folder) -> None:
    with pytest.raises(ForegateError, match=r"has no lookahead gates: train them with foregate align") as caught:
        foregate.load(store("mixtral"), policy="lookahead")
    assert "\n" not in str(caught.value)
    foregate.load(store("mixtral"), policy="lru")


def test_gates_that_do_not_fit_are_harmless_to_other_policies(store: Folder, tmp_path: Path) -> None:
    copied = with_gates(store("mixtral"), tmp_path, input_size=16)
    with pytest.raises(ForegateError, match="trained for routers of 16 inputs"):
        foregate.load(copied, policy="lookahead")
    (copied / GATES_FILE).write_bytes(b"no gates")
    with pytest.raises(ForegateError, match="is damaged"):
        foregate.load(copied, policy="lookahead")
    foregate.load(copied, policy="lru")


def test_gates_of_a_checkpoint_go_into_its_stores(checkpoint: Folder, store: Folder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "checkpoint"))
    shutil.copy(with_gates(store("mixtral"), tmp_path) / GATES_FILE, source)
    for bits in (16, 3):
        made = foregate.convert(source, tmp_path / f"{bits}.store", bits=bits)
        foregate.load(made, policy="lookahead")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("native", [True, False])
def test_live_gates_say_what_the_gates_compute(
    store: Folder, family: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, every prediction of a run against `LookaheadGates` on the same router inputs."""
    if not native:
        monkeypatch.setattr(cpu, "available", lambda: False)
    copied = with_gates(store(family), tmp_path)
    model = foregate.load(copied, memory="100%", policy="lookahead")
    reference = LookaheadGates.load(copied / GATES_FILE, model.foregate.store.layers)
    routers = find_routers(model, model.foregate.store.layers)
    own = untrained_of_model(model, model.foregate.store.layers, horizon=1)
    embedded, routed, guesses = [], {}, 0
    tokens = (5, 9, 5, 77, 12, 3, 8)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output[0]))
    modules = [layer.module for layer in reference.header.layers]
    calls, cache = model.foregate.record_calls(), None
    with observed(model, modules, routers, routed.__setitem__), torch.inference_mode():
        for token in tokens:
            start = len(calls)
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
            check(calls[start].before, reference.predict(len(modules), embedded[-1]))
            for layer, call in enumerate(calls[start:]):
                inputs = routed[layer]["inputs"].float()
                reference.observe(layer, routed[layer]["scores"], routed[layer]["chosen"])
                check(call.after, reference.predict(layer, inputs))
                if (guess := call.after.guess) is not None:
                    guesses += 1
                    check(Prediction(layer, ((layer + 1, guess),)), own.predict(layer, inputs))
                torch.testing.assert_close(
                    torch.from_numpy(call.after.reuse).float(), reference.reuse(layer, inputs), atol=2e-2, rtol=0.1
                )
    assert len(calls) == len(tokens) * len(modules)
    assert 0 < guesses < len(calls), "asked for before judged calls only, and never over the token's end"


def check(prediction: Prediction, expected: list[tuple[Target, torch.Tensor]]) -> None:
    """Inputs of a trace are rounded to bfloat16, so values agree to about that."""
    assert [target for target, _ in prediction.ahead] == [target.layer for target, _ in expected]
    for (_, found), (_, wanted) in zip(prediction.ahead, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found).float(), wanted, atol=2e-2, rtol=0.1)


def test_next_router_guesses_with_the_next_layers_router(store: Folder) -> None:
    model = foregate.load(store("mixtral"), memory="100%", policy="mixtral-offloading")
    calls, routed = model.foregate.record_calls(), {}
    layers = model.foregate.store.layers
    routers = find_routers(model, layers)
    with observed(model, [n.module for n in layers], routers, routed.__setitem__), torch.inference_mode():
        model(torch.tensor([[7]]))
    assert calls[-1].after is None
    for layer, call in enumerate(calls[:-1]):
        (target, found), wanted = call.after.ahead[0], routers[layer + 1].weight @ routed[layer]["inputs"][0].float()
        assert target == layer + 1
        assert np.argsort(-found)[:2].tolist() == wanted.argsort(descending=True)[:2].tolist()
