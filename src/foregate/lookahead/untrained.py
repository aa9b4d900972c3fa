"""Gates as they are before alignment, all of a model's: the later layers' routers behind the later layers' norms."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from foregate.checkpoint.store import LayerInfo
from foregate.lookahead.gate import GateLayer, RouterWeights, untrained_gate
from foregate.lookahead.gates import GatesHeader, LookaheadGates
from foregate.lookahead.samples import gate_layers, router_weights
from foregate.lookahead.trace import Trace
from foregate.model.routers import find_routers


def untrained_gates(
    layers: Sequence[GateLayer], routers: Sequence[RouterWeights], embedding_size: int, horizon: int
) -> LookaheadGates:
    """Untrained gates of every source, without reuse heads. horizon: MoE layers ahead, at most all."""
    header = GatesHeader(tuple(layers), embedding_size, min(horizon, len(layers)), width=0, trained={})
    gates = [
        untrained_gate(layers, routers, source, header.horizon, header.width, header.input_size(source))
        for source in range(len(layers) + 1)
    ]
    return LookaheadGates(header, [gate.requires_grad_(False) for gate in gates])


def untrained_of_trace(trace: Trace, horizon: int) -> LookaheadGates:
    """From the routers that a trace has kept."""
    return untrained_gates(gate_layers(trace), router_weights(trace), trace.header.embedding_size, horizon)


def untrained_of_model(model: PreTrainedModel, layers: Sequence[LayerInfo], horizon: int) -> LookaheadGates:
    """From a model's own routers. Raises ForegateError when one cannot be found."""
    found = find_routers(model, layers)
    known = [
        GateLayer(layer.module, layer.num_experts, layer.top_k, router.input_size)
        for layer, router in zip(layers, found, strict=True)
    ]
    weights = [
        RouterWeights(
            *(None if part is None else part[: layer.num_experts] for part in (router.weight, router.bias)), router.gain
        )
        for layer, router in zip(layers, found, strict=True)
    ]
    return untrained_gates(known, weights, model.get_input_embeddings().weight.shape[1], horizon)
