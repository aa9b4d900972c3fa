"""What a model is made of, read from its configuration alone: where its experts sit and what their weights look like.

transformers gives about 60 MoE families one experts interface (its `use_experts_implementation` decorator): a module
that holds every expert of a layer as 3-D parameters and is called as experts(hidden_states [T, H], top_k_index [T, k],
top_k_weights [T, k]). Foregate supports exactly the families behind it and keeps no modelling code of its own.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from foregate.errors import ForegateError, first_line

INTERFACE_TRAITS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what the decorator sets
# Names under which a family's modules or configuration say how many experts a token uses.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "topk",
    "top_k",
)
AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)  # the second for families that also see


@dataclass(frozen=True)
class ExpertsModule:
    """The routed experts of one MoE layer."""

    name: str  # module path in the transformers model
    class_name: str
    num_experts: int
    top_k: int
    transposed: bool  # weights held as [in, out] instead of [out, in]
    params: dict[str, tuple[int, ...]]  # parameter name -> shape of one expert's part


@dataclass(frozen=True)
class Architecture:
    """A model without weights (on the meta device) and its MoE layers in order."""

    model: PreTrainedModel
    layers: tuple[ExpertsModule, ...]

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def expert_classes(self) -> set[type[nn.Module]]:
        return {type(self.model.get_submodule(layer.name)) for layer in self.layers}


def inspect_architecture(config: PretrainedConfig) -> Architecture:
    """Build the model of `config` on the meta device and find its MoE layers.

    Raises ForegateError for a model without routed experts, with experts outside transformers' interface, or with
    experts that several modules share.
    """
    model = _meta_model(config)
    name = f"{type(model).__name__} (model_type {config.model_type})"
    found = [(path, module) for path, module in model.named_modules() if _is_experts(module)]
    if not found and (outside := _experts_outside_interface(model)):
        raise ForegateError(
            f"{name} is not supported: its experts class {outside} does not go through transformers' experts "
            "interface, so its experts cannot be streamed"
        )
    if not found:
        raise ForegateError(f"{name} is not a Mixture-of-Experts model: it has no routed experts to stream")
    params = [param for _, module in found for param in module.parameters()]
    if len(set(params)) < len(params):
        raise ForegateError(f"{name} is not supported: two parts of the model share the same experts")
    return Architecture(model, tuple(_describe(model, path, module) for path, module in found))


def auto_class(config: PretrainedConfig) -> type:
    """The transformers Auto class that builds the generating model of `config`. Raises ForegateError if none does."""
    for candidate in AUTO_CLASSES:
        if type(config) in candidate._model_mapping:
            return candidate
    raise ForegateError(
        f"{type(config).__name__} (model_type {config.model_type}) has no text-generating model in transformers: only "
        "models that generate text can be run"
    )


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    builder = auto_class(config)
    try:
        with torch.device("meta"), _no_quantizer(config):
            # Packed MXFP4 experts become what the model's parameters are: bfloat16 holds them exactly.
            return builder.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    except Exception as error:  # whatever a family's code raises on values that make no model
        raise ForegateError(
            f"{type(config).__name__} (model_type {config.model_type}) cannot be built from its config.json: "
            f"{first_line(error)}"
        ) from None


@contextlib.contextmanager
def _no_quantizer(config: PretrainedConfig) -> Iterator[None]:
    saved = config.__dict__.pop("quantization_config", None)
    try:
        yield
    finally:
        if saved is not None:
            config.quantization_config = saved


def _is_experts(module: nn.Module) -> bool:
    """Whether the module stands behind the interface and holds 3-D expert weights of its own."""
    return all(hasattr(module, trait) for trait in INTERFACE_TRAITS) and _holds_experts(module)


def _holds_experts(module: nn.Module) -> bool:
    return any(param.dim() == 3 for _, param in module.named_parameters(recurse=False))


def _experts_outside_interface(model: nn.Module) -> str | None:
    """Class name of a routed-experts module that is not behind the interface: one can only tell by its name."""
    for module in model.modules():
        name = type(module).__name__
        if "Experts" in name and "Shared" not in name and any(True for _ in module.parameters()):
            return name
    return None


def _describe(model: PreTrainedModel, path: str, module: nn.Module) -> ExpertsModule:
    transposed = bool(module.is_transposed)
    params = {}
    for name, param in module.named_parameters(recurse=False):
        shape = tuple(param.shape[1:])
        params[name] = shape[::-1] if transposed and len(shape) == 2 else shape
    counts = {param.shape[0] for _, param in module.named_parameters(recurse=False)}
    if len(counts) != 1:
        raise ForegateError(
            f"{type(module).__name__} at {path} has parameters for {sorted(counts)} experts: one count was expected"
        )
    num_experts, top_k = counts.pop(), _top_k(model, path)
    if top_k > num_experts:
        raise ForegateError(f"config.json asks for {top_k} experts a token, but {path} has {num_experts}: correct it")
    return ExpertsModule(path, type(module).__name__, num_experts, top_k, transposed, params)


def _top_k(model: PreTrainedModel, path: str) -> int:
    """How many experts a token uses in this layer: from the modules around the experts, else from the configuration."""
    parent = model.get_submodule(path.rpartition(".")[0])
    for owner in (parent, *parent.children(), model.config.get_text_config()):
        for name in TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, list) and value:
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    raise ForegateError(
        f"{type(model).__name__} does not say how many experts a token uses: none of {', '.join(TOP_K_NAMES)} is set"
    )
