"""Where a model's routers are and what they compute, found by watching a tiny forward pass and asking the modules.

No family is named here. transformers says which class gives a family's router logits (`_can_record_outputs`); where it
does not, the router is the module that returned the very indices the experts were called with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from foregate.checkpoint.store import LayerInfo
from foregate.errors import ForegateError, first_line
from foregate.model.experts import ExpertsCall, experts_call, silent_experts

PROBE_TOKENS = 8
TOLERANCE = 1e-4  # relative; float32 sums in another order differ by less
LOGITS = "router_logits"  # transformers' name for them


@dataclass(frozen=True)
class Router:
    """The router of one MoE layer. Sizes are those seen in a forward pass."""

    name: str  # module path in the model
    module: nn.Module
    scores_index: int  # which of the module's outputs is the logits
    gives_probabilities: bool  # a few families put the softmax there; its logarithm stands for the logits
    scores_size: int  # logits a token; more than there are experts when a family has an entry for "none"
    input_size: int
    expert_input_size: int
    shares_input: bool  # whether the experts are given exactly what the router is given
    top_k: int
    weight: torch.Tensor | None  # float32 [scores_size, input_size] if logits = input @ weight.T + bias, else None
    bias: torch.Tensor | None  # float32 [scores_size] where that is not zero
    gain: torch.Tensor | None  # float32 [input_size]: the input is x / rms(x) * gain; None: no such norm was found

    def scores(self, output: Any) -> torch.Tensor:
        """The logits [tokens, scores_size] in what the module returned."""
        scores = _scores(output, self.scores_index)
        if not self.gives_probabilities:
            return scores
        scores = scores.float()
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


@dataclass(frozen=True)
class _Call:
    """One module's call in the watched pass, in order of completion."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple


def find_routers(model: PreTrainedModel, layers: Sequence[LayerInfo]) -> tuple[Router, ...]:
    """The routers of the MoE layers `layers` of `model`, in their order.

    Runs the model on a few tokens with experts that give zeros, so nothing is read from disk. Raises ForegateError
    naming the first layer whose router cannot be found.
    """
    experts = [model.get_submodule(layer.module) for layer in layers]
    calls = _watch(model, experts)
    order = {id(call.module): index for index, call in enumerate(calls)}
    recorders = _recorders(model)
    routers, start = [], 0
    for layer, module in zip(layers, experts, strict=True):
        if id(module) not in order:
            raise _not_found(model, layer, "its experts were not called")
        end = order[id(module)]
        routers.append(_describe(model, layer, calls[start:end], calls[end], recorders))
        start = end + 1
    return tuple(routers)


def router_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states [..., hidden] in a router's arguments: its first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _scores(output: Any, index: int) -> torch.Tensor:
    scores = output[index] if isinstance(output, tuple) else output
    return scores if scores.dim() == 2 else scores.reshape(-1, scores.shape[-1])


def _watch(model: PreTrainedModel, experts: list[nn.Module]) -> list[_Call]:
    """Every module's call during a forward pass of a few tokens. Tensors are copies: families change some in place."""
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            values = {key: _copy(value) for key, value in kwargs.items()}
            calls.append(_Call(name, module, tuple(map(_copy, args)), values, tuple(map(_copy, outputs))))

        return hook

    ids = torch.arange(PROBE_TOKENS)[None] % model.get_input_embeddings().weight.shape[0]
    handles = [
        module.register_forward_hook(note(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        with silent_experts(experts), torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    except ForegateError:
        raise
    except Exception as error:  # whatever a family's code raises on a plain text input
        raise ForegateError(
            f"{_title(model)} does not run on plain text, so its routers cannot be watched: {first_line(error)}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _describe(
    model: PreTrainedModel, layer: LayerInfo, calls: list[_Call], experts: _Call, recorders: list[OutputRecorder]
) -> Router:
    asked = experts_call(experts.args, experts.kwargs)
    call, index = _find(calls, asked, layer.num_experts, recorders) or (None, 0)
    if call is None:
        raise _not_found(model, layer, "no module returned the choice its experts were called with")
    hidden = router_input(call.args, call.kwargs)
    flat = hidden.reshape(-1, hidden.shape[-1])
    scores = _scores(call.outputs, index)
    if len(scores) != len(asked.chosen) or len(flat) != len(scores) or scores.shape[-1] < layer.num_experts:
        raise _not_found(model, layer, f"{call.name} gives scores {list(scores.shape)}")
    weight, bias = _linear(call, index, hidden, scores.shape[-1])
    return Router(
        name=call.name,
        module=call.module,
        scores_index=index,
        gives_probabilities=bool((scores >= 0).all()) and _close(scores.sum(-1), torch.ones(len(scores))),
        scores_size=scores.shape[-1],
        input_size=hidden.shape[-1],
        expert_input_size=asked.hidden.shape[-1],
        shares_input=torch.equal(flat, asked.hidden),
        top_k=asked.chosen.shape[-1],
        weight=weight,
        bias=bias,
        gain=_gain(calls, flat),
    )


def _find(
    calls: list[_Call], asked: ExpertsCall, num_experts: int, recorders: list[OutputRecorder]
) -> tuple[_Call, int] | None:
    """The router among the calls since the previous MoE layer, and which of its outputs is the logits."""
    for call in reversed(calls):
        for recorder in recorders:
            if _matches(recorder, call):
                return call, recorder.index
    for call in reversed(calls):
        if any(_equal(output, asked.chosen) for output in call.outputs):
            for index, output in enumerate(call.outputs):
                if isinstance(output, torch.Tensor) and output.is_floating_point() and output.shape[-1] >= num_experts:
                    return call, index
    return None


def _matches(recorder: OutputRecorder, call: _Call) -> bool:
    named = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{call.name}."
    return named and recorder.target_class is not None and isinstance(call.module, recorder.target_class)


def _recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    """What transformers records as router logits in any part of the model."""
    found: list[OutputRecorder] = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            specs = (part._can_record_outputs or {}).get(LOGITS, [])
            found += specs if isinstance(specs, list) else [specs]
    return [spec for spec in found if isinstance(spec, OutputRecorder)]


def _linear(
    call: _Call, index: int, hidden: torch.Tensor, size: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(weight, bias) if one of the router's own matrices, times a number, explains its logits of random inputs."""
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what is returned may be trained on: inference tensors may not
        bias = _scores_of(call, index, torch.zeros_like(hidden))[0]
        wanted = _scores_of(call, index, probe) - bias
        for param in call.module.parameters():
            if param.dim() != 2 or param.shape[1] != hidden.shape[-1] or param.shape[0] < size:
                continue
            weight = param.detach()[:size].float()
            product = probe.reshape(-1, hidden.shape[-1]) @ weight.T
            scale = ((product * wanted).sum() / (product * product).sum()).item()
            if _close(product * scale, wanted):
                weight = weight if abs(scale - 1) < TOLERANCE else weight * scale
                return weight, bias.clone() if bias.any() else None
    return None, None


def _scores_of(call: _Call, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """The router's logits of other hidden states, its other arguments as they were."""
    original = router_input(call.args, call.kwargs)
    args = tuple(hidden if value is original else value for value in call.args)
    kwargs = {key: hidden if value is original else value for key, value in call.kwargs.items()}
    return _scores(call.module(*args, **kwargs), index).float()


def _gain(calls: list[_Call], wanted: torch.Tensor) -> torch.Tensor | None:
    """The gain of the RMS norm whose output the router's input is, if there is one."""
    for call in calls:
        if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], torch.Tensor):
            continue
        given, output = call.args[0], call.outputs[0]
        if not isinstance(output, torch.Tensor) or given.shape != output.shape or output.numel() != wanted.numel():
            continue
        if not torch.equal(output.reshape(wanted.shape), wanted):
            continue
        probe = torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            gain = call.module(torch.ones(given.shape)).reshape(-1, given.shape[-1])[0].float()
            if _close(normalized(probe) * gain, call.module(probe).float()):
                return gain.clone()
    return None


def normalized(hidden: torch.Tensor) -> torch.Tensor:
    """x / rms(x) over the last dimension."""
    return hidden / hidden.float().pow(2).mean(-1, keepdim=True).sqrt()


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _equal(output: Any, chosen: torch.Tensor) -> bool:
    return (
        isinstance(output, torch.Tensor)
        and output.numel() == chosen.numel()
        and torch.equal(output.reshape(chosen.shape).to(chosen.dtype), chosen)
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _title(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def _not_found(model: PreTrainedModel, layer: LayerInfo, why: str) -> ForegateError:
    return ForegateError(f"{_title(model)}: the router of {layer.module} was not found ({why}): it cannot be traced")
