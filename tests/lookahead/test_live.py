"""The lookahead policy: it needs gates that fit, listens to them, and never changes a model's output."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import foregate
from foregate.checkpoint.source import GATES_FILE
from foregate.errors import ForegateError
from foregate.lookahead.gates import GateLayer, GatesHeader, LookaheadGates
from foregate.schedule.lookahead import LookaheadScheduler

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
        listened.append(getattr(model.foregate.scheduler, "_reuse", {}))
    assert torch.equal(*texts)
    assert not listened[0] and len(listened[1]) == len(model.foregate.store.layers)


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


def test_the_least_expected_leaves_first() -> None:
    scheduler = LookaheadScheduler(3)
    for expert in (0, 1, 2):
        for load in scheduler.routed(0, [expert]):
            scheduler.arrived(load.key)
        scheduler.computed((0, expert))
    scheduler.reuse_expected(0, [0.5, 0.1, 0.3, 0.0])
    assert scheduler.victim() == (0, 1)
    scheduler.choice_expected(0, [0.0, 0.9, 0.0, 0.0])
    assert scheduler.victim() == (0, 2)
    scheduler.reuse_expected(0, [0.0, 0.0, 0.0, 0.0])
    assert scheduler.victim() == (0, 0)  # all equal: the least recently used
