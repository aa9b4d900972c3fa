"""The gates of an inflated model foresee what those of the small one do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from foregate.checkpoint.architecture import inspect_architecture
from foregate.checkpoint.inflate import inflate
from foregate.checkpoint.source import GATES_FILE
from foregate.errors import ForegateError
from foregate.lookahead.gate import GateLayer, token_source
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.inflate import inflate_gates
from foregate.lookahead.reuse import FEATURES

DEMO = Path(__file__).parents[2] / "demo"
DEMO_SIZES = {"mixtral-tiny": (768, 128), "qwen3-moe-tiny": (384, 192)}


def gates_of(path: Path, model: PreTrainedModel) -> LookaheadGates:
    size = model.config.hidden_size
    layers = [GateLayer(n.name, n.num_experts, n.top_k, size) for n in inspect_architecture(model.config).layers]
    return LookaheadGates.load(path / GATES_FILE, layers)


def sources(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each gate reads over a text: the routers' inputs, then the embeddings; [tokens, size] each."""
    found: list[torch.Tensor] = []
    routers = [layer.mlp.gate for layer in model.model.layers]
    hooks = [
        router.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2))) for router in routers
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [*found, token_source(model.model.embed_tokens(ids)[0])]


def answers(gates: LookaheadGates, inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Every gate's probabilities, then every reuse head's, for the same past."""
    random = torch.Generator().manual_seed(3)
    for gate, source in zip(gates.gates, inputs, strict=True):
        recent = torch.randn(len(source), sum(gate.sizes), generator=random)
        yield torch.cat(gate.probabilities(gate(source, recent)), -1)
        if gate.reuse:
            features = torch.rand(len(source), FEATURES, gate.reuse.num_experts, generator=random)
            yield torch.sigmoid(gate.reuse(source, features))


@pytest.mark.parametrize("name", DEMO_SIZES)
@torch.inference_mode()
def test_same_probabilities_from_the_inflated_inputs(name: str, tmp_path: Path) -> None:
    hidden, ffn = DEMO_SIZES[name]
    found = []
    for path in (DEMO / name, inflate(DEMO / name, tmp_path / "wide", hidden=hidden, ffn=ffn)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(path)("In the beginning God created", return_tensors="pt").input_ids
        gates = gates_of(path, model)
        assert gates.header.embedding_size == model.config.hidden_size
        found.append((gates.header.trained, list(answers(gates, sources(model, ids)))))
    (trained, expected), (trained_wide, given) = found
    assert trained == trained_wide
    assert len(expected) == 2 * len(inspect_architecture(model.config).layers) + 1
    for before, after in zip(expected, given, strict=True):
        assert before.std() > 0.01
        torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


def test_gates_that_read_something_else() -> None:
    layers = [GateLayer(f"model.layers.{n}.mlp.experts", 8, 2, 256) for n in range(12)]
    gates = LookaheadGates.load(DEMO / "mixtral-tiny" / GATES_FILE, layers)
    with pytest.raises(ForegateError, match="do not read the model's hidden size 128: train them again with foregate"):
        inflate_gates(gates, 128, 256)
