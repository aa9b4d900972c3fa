"""What a model is made of, read from its configuration alone: where its experts sit and what their weights look like.

transformers gives about 60 MoE families one experts interface (its `use_experts_implementation` decorator): a module
that holds every expert of a layer as 3-D parameters and is called as experts(hidden_states [T, H], top_k_index [T, k],
top_k_weights [T, k]). Foregate supports exactly the families behind it and keeps no modelling code of its own.
"""

import contextlib
import functools
import inspect
import re
from collections import Counter
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
LEAST_OUTPUTS = 32  # a linear module with fewer is a gate: nothing to gain, and precision to lose


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
    dtype: torch.dtype  # that the configuration says weights are stored in; bfloat16 where it says nothing

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
    dtype = _stored_dtype(config)
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
    return Architecture(model, tuple(_describe(model, path, module) for path, module in found), dtype)


@dataclass(frozen=True)
class BackboneMatrices:
    """The linear modules of the decoder layers, by path: attention, shared experts, dense layers."""

    shapes: dict[str, tuple[int, int]]  # those that can be quantized -> [out, in]
    kept: tuple[
        str, ...
    ]  # those that cannot: the family's code reads their weights itself, or several modules share them


def backbone_matrices(architecture: Architecture) -> BackboneMatrices:
    """Which matrices of the backbone may be quantized.

    Not among them: what lies outside the decoder layers (embeddings, head, vision towers), routers and small gates.
    """
    model = architecture.model
    uses = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    shapes, kept = {}, []
    for path, module in _decoder_modules(architecture):
        if type(module).forward is not nn.Linear.forward or module.out_features < LEAST_OUTPUTS:
            continue
        if _looks_like_router(architecture, path, module):
            continue
        if uses[id(module.weight)] > 1 or _weight_is_read(model, path):
            kept.append(path)
        else:
            shapes[path] = (module.out_features, module.in_features)
    return BackboneMatrices(shapes, tuple(kept))


def _looks_like_router(architecture: Architecture, path: str, module: nn.Linear) -> bool:
    """Whether a linear module beside a layer's experts has one output for each of them."""
    return any(
        module.out_features == layer.num_experts and path.startswith(layer.name.rpartition(".")[0] + ".")
        for layer in architecture.layers
    )


def _decoder_modules(architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """All modules of the decoder layers but the routers' own: a list of layers is a decoder if one of them has experts."""
    model = architecture.model
    recorded = tuple(f"{path}." for path in _router_paths(model))
    routers = tuple(prefix for prefix in recorded if not any(n.name.startswith(prefix) for n in architecture.layers))
    stacks = tuple({f"{_stack(model, layer.name)}." for layer in architecture.layers})
    return [
        (path, module)
        for path, module in model.named_modules()
        if path.startswith(stacks) and not f"{path}.".startswith(routers)
    ]


def _stack(model: nn.Module, path: str) -> str:
    """The outermost list of modules on the way to `path`: the decoder's layers."""
    parts = path.split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), nn.ModuleList)), path)


def _router_paths(model: nn.Module) -> list[str]:
    """The modules that a family names as the source of its router's logits: by class, some by a part of the path too."""
    sources: set[tuple[type[nn.Module], str]] = set()
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in recorded if isinstance(recorded, list) else [recorded]:
            sources.add((getattr(entry, "target_class", entry), getattr(entry, "layer_name", None) or ""))
    return [
        path
        for path, module in model.named_modules()
        if any(isinstance(module, cls) and f".{part}.".replace("..", ".") in f".{path}." for cls, part in sources)
    ]


def _weight_is_read(model: nn.Module, path: str) -> bool:
    """Whether the code around a module uses its weight without calling the module."""
    parts = path.split(".")
    pattern = re.compile(rf"\b{re.escape(parts[-1])}\.weight\b")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    around = {type(parent) for parent in parents if not isinstance(parent, PreTrainedModel)}
    return any(pattern.search(_source(base)) for cls in around for base in cls.__mro__)


@functools.cache
def _source(cls: type) -> str:
    """The source of a class; empty for those of PyTorch and Python, which know no family's modules."""
    return "" if cls.__module__.partition(".")[0] in ("torch", "builtins") else inspect.getsource(cls)


def auto_class(config: PretrainedConfig) -> type:
    """The transformers Auto class that builds the generating model of `config`. Raises ForegateError if none does."""
    for candidate in AUTO_CLASSES:
        if type(config) in candidate._model_mapping:
            return candidate
    raise ForegateError(
        f"{type(config).__name__} (model_type {config.model_type}) has no text-generating model in transformers: only "
        "models that generate text can be run"
    )


def _stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Read before a model is built, which notes its own precision in the configuration."""
    for owner in (config, config.get_text_config()):
        if isinstance(dtype := getattr(owner, "dtype", None), torch.dtype):
            return dtype
    return torch.bfloat16


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
