"""The engine's steps on a stopwatch, and the machine they amount to for the simulator."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from transformers import PreTrainedModel

from foregate.report import Recorder
from foregate.schedule import Call, Prediction
from foregate.simulate import Machine


@dataclass
class Step:
    """One call of a MoE layer. Times are those of time.perf_counter."""

    layer: int
    counts: bool  # outside the prompts and the warm-up
    start: float
    foreseen: float | None = None  # when gates had been asked about the token, before the first layer
    end: float = 0.0
    stall_seconds: float = 0.0
    kernels: list[tuple[int, float]] = field(default_factory=list)  # (experts, seconds) of each kernel call

    @property
    def kernel_seconds(self) -> float:
        return sum(seconds for _, seconds in self.kernels)


class StepWatch(Recorder):
    """An engine's recorder that also keeps every step of a model and every call with its predictions.

    An instance is what `bench.live.measure` takes as its `watch`.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.steps: list[Step] = []
        self.calls: list[Call] = []  # one a step
        self._foreseen: float | None = None  # of the step to come

    def __call__(self, model: PreTrainedModel, counting: Callable[[], bool]) -> None:
        """Watch this model from now on."""
        engine = model.foregate
        self.experts = tuple(layer.num_experts for layer in engine.store.layers)
        self.reset()
        engine.recorder, self.calls = self, engine.record_calls()
        for index, layer in enumerate(engine.store.layers):
            module = model.get_submodule(layer.module)
            module.register_forward_pre_hook(self._begin(index, counting))
            module.register_forward_hook(self._end)

    def predicted(self, prediction: Prediction) -> None:
        super().predicted(prediction)
        if prediction.token:
            self._foreseen = time.perf_counter()

    def stalled(self, layer: int, seconds: float) -> None:
        super().stalled(layer, seconds)
        self.steps[-1].stall_seconds += seconds

    def computed(self, layer: int, experts: int, seconds: float) -> None:
        super().computed(layer, experts, seconds)
        self.steps[-1].kernels.append((experts, seconds))

    def _begin(self, layer: int, counting: Callable[[], bool]) -> Callable[..., None]:
        def hook(*ignored: Any) -> None:
            self.steps.append(Step(layer, counting(), time.perf_counter(), self._foreseen))
            self._foreseen = None

        return hook

    def _end(self, *ignored: Any) -> None:
        self.steps[-1].end = time.perf_counter()


def machine_of(watch: StepWatch, record_bytes: int, link_bandwidth: float, *, paced: bool) -> Machine:
    """The machine whose mean times are those of the steps that count.

    What a step took beside kernels, waiting and predicting belongs to its layer, and so does the time since the step
    before; what more there is before the first layer belongs to the token, some of it after gates have spoken.
    """
    timed = [index for index, step in enumerate(watch.steps) if step.counts and index]
    gaps: dict[bool, list[float]] = {True: [], False: []}  # before the first layer, before another
    starts = [step.start - step.foreseen for step in watch.steps if step.counts and step.foreseen]
    inside, predicting = [], []
    for index in timed:
        step, call = watch.steps[index], watch.calls[index]
        before, after = _seconds(call.before), _seconds(call.after)
        gaps[step.layer == 0].append(step.start - watch.steps[index - 1].end - before)
        inside.append(step.end - step.start - step.kernel_seconds - step.stall_seconds - after)
        predicting += [seconds for seconds in (before, after) if seconds]
    call_seconds, expert_seconds = _line([kernel for index in timed for kernel in watch.steps[index].kernels])
    between = mean(gaps[False]) if gaps[False] else 0.0
    token = max(mean(gaps[True]) - between, 0.0)
    return Machine(
        record_bytes=record_bytes,
        link_bandwidth=link_bandwidth,
        paced=paced,
        layer_seconds=between + mean(inside),
        expert_seconds=expert_seconds,
        call_seconds=call_seconds,
        token_seconds=token,
        start_seconds=min(max(mean(starts) - between, 0.0), token) if starts else 0.0,
        gate_seconds=mean(predicting) if predicting else 0.0,
    )


def _seconds(prediction: Prediction | None) -> float:
    return prediction.seconds if prediction else 0.0


def _line(kernels: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(fixed, each): least squares of seconds = fixed + each * experts; neither is negative, the mean is kept."""
    counts, times = [count for count, _ in kernels], [seconds for _, seconds in kernels]
    middle, mean_time = mean(counts), mean(times)
    spread = sum((count - middle) ** 2 for count in counts)
    each = sum((count - middle) * (time - mean_time) for count, time in kernels) / spread if spread else 0.0
    if not 0 < each * middle <= mean_time:
        each = mean_time / middle
    return mean_time - each * middle, each
