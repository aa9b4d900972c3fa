"""The grid's states against what the engine counts."""

from collections.abc import Callable
from pathlib import Path

import torch

import foregate
from foregate.serve.residency import Residency


def test_chosen_and_missed_are_what_the_recorder_counts(store: Callable[[str], Path]) -> None:
    model = foregate.load(store("mixtral"), memory="50%")
    residency, recorder = Residency(model), model.foregate.recorder
    for seed in range(4):
        recorder.reset()
        ids = torch.randint(3, 250, (1, 3), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            model(ids)
        layers = residency.snapshot()
        assert [len(layer["missed"]) for layer in layers] == [counts.misses for counts in recorder.layers]
        assert [len(layer["chosen"]) for layer in layers] == [c.hits + c.misses for c in recorder.layers]
        assert all(set(layer["missed"]) <= set(layer["chosen"]) for layer in layers)
        assert sum(len(layer["resident"]) for layer in layers) == model.foregate.budget.slots
    assert set(layers[-1]["chosen"]) <= set(layers[-1]["resident"])  # nothing came after to evict them
    model.foregate.close()
