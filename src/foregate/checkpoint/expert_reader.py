"""Streams single experts out of any checkpoint layout, through transformers' own checkpoint conversions.

A checkpoint may hold an expert as tensors of its own (`experts.5.w1.weight`), or all experts of a layer fused in one
tensor; transformers' conversion mapping says how either becomes the model's fused parameters. Every conversion that
concerns experts works on each expert by itself, so it is run here on one expert at a time: peak memory is one expert.
"""

from collections import defaultdict
from copy import deepcopy

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from foregate.checkpoint.architecture import Architecture, ExpertsModule
from foregate.checkpoint.source import Checkpoint
from foregate.errors import ForegateError, first_line

# Conversions that treat every expert by itself (dimension 0 is the expert).
SEPARABLE = (MergeModulelist, Concatenate, Transpose, Interleave, Mxfp4Dequantize)


class ExpertReader:
    """Sorts a checkpoint's tensors into experts, backbone and unused, and reads experts one by one."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.backbone: list[str] = []  # checkpoint keys of everything but the routed experts
        self.places: dict[str, tuple[str, str | None]] = {}  # backbone key -> parameter, pattern of the conversion
        self.unused: list[str] = []  # keys the text model has no place for (vision towers, extra heads)
        mapping = get_model_conversion_mapping(architecture.model, hf_quantizer=_dequantizer(checkpoint))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        # Parameter of the model -> pattern of the conversion (or checkpoint key) -> checkpoint keys, by expert.
        self._sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._one_expert = _OneExpertModel(architecture.model)
        self._sort_keys()
        self._check_complete()

    def read(self, layer: ExpertsModule, expert: int) -> dict[str, torch.Tensor]:
        """One expert's parameters, each [out, in] (biases [out]) and contiguous, in the checkpoint's own dtype."""
        return {name: self._read_param(layer, name, expert) for name in layer.params}

    @property
    def expert_places(self) -> dict[str, tuple[str, str | None]]:
        """Key of an expert's tensor, or of a layer's -> parameter, pattern of the conversion."""
        return {
            key: (target, None if pattern == key else pattern)
            for target, sources in self._sources.items()
            for pattern, keys in sources.items()
            for key in keys
        }

    def _sort_keys(self) -> None:
        state = self.architecture.model.state_dict()
        params = {f"{layer.name}.{name}" for layer in self.architecture.layers for name in layer.params}
        found: set[str] = set()
        for key in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = self._rename(key, state)
            if target in params:
                self._sources[target][pattern or key].append(key)
            elif target in state:
                if pattern is None:
                    self._check_shape(key, tuple(state[target].shape))
                self.backbone.append(key)
                self.places[key] = (target, pattern)
                found |= self.targets(target, pattern)
            else:
                self.unused.append(key)
        self._check_backbone(found, params)

    def _rename(self, key: str, state: dict[str, torch.Tensor]) -> tuple[str, str | None]:
        prefix = self.architecture.model.base_model_prefix
        target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, state)
        if target not in state and key in state:  # already under the model's own name
            target, pattern = rename_source_key(key, [], [], prefix, state)
        return target, pattern

    def targets(self, target: str, pattern: str | None) -> set[str]:
        """What a checkpoint tensor becomes: one parameter, or several where a conversion splits it."""
        converter = self.converter(pattern) if pattern else None
        if converter is None:
            return {target}
        return {target.replace(converter.target_patterns[0], name) for name in converter.target_patterns}

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        found = self.checkpoint.tensors[key].shape
        if found != shape:
            raise ForegateError(
                f"{self.checkpoint.path}: {key} has shape {found} where config.json asks for {shape}: weights and "
                "configuration do not belong together"
            )

    def _check_backbone(self, found: set[str], expert_params: set[str]) -> None:
        """Every backbone parameter is in the checkpoint under at least one of its names (tied weights have several)."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, param in self.architecture.model.named_parameters(remove_duplicate=False):
            if name not in expert_params:
                names[id(param)].append(name)
        missing = sorted(min(aliases) for aliases in names.values() if found.isdisjoint(aliases))
        if missing:
            raise ForegateError(
                f"{self.checkpoint.path} holds no tensor for {missing[0]} ({len(missing)} missing): the checkpoint is "
                "incomplete"
            )

    def _check_complete(self) -> None:
        for layer in self.architecture.layers:
            for name in layer.params:
                sources = self._sources.get(f"{layer.name}.{name}")
                if not sources:
                    raise ForegateError(
                        f"{self.checkpoint.path} holds no tensor for {layer.name}.{name}: the checkpoint is incomplete"
                    )
                self._check_separable(layer, next(iter(sources)))
                for pattern, keys in sources.items():
                    single = not _merges(self.converter(pattern))
                    held = self.checkpoint.tensors[keys[0]].shape[0] if single else len(keys)
                    if held != layer.num_experts or (single and len(keys) > 1):
                        raise ForegateError(
                            f"{self.checkpoint.path} holds {held} of {layer.num_experts} experts for {pattern} in "
                            f"{layer.name}: the checkpoint is incomplete"
                        )

    def _check_separable(self, layer: ExpertsModule, pattern: str) -> None:
        converter = self.converter(pattern)
        for op in converter.operations if converter else ():
            if not isinstance(op, SEPARABLE):
                raise ForegateError(
                    f"{self.architecture.class_name} is not supported: its checkpoint conversion {type(op).__name__} of "
                    f"{layer.class_name} mixes experts, so they cannot be streamed one by one"
                )

    def _read_param(self, layer: ExpertsModule, name: str, expert: int) -> torch.Tensor:
        target = f"{layer.name}.{name}"
        tensor = self._convert(target, expert)
        shape = layer.params[name]
        turned = layer.transposed and len(shape) == 2
        stored = shape[::-1] if turned else shape
        if tuple(tensor.shape) != (1, *stored):
            raise ForegateError(
                f"{self.checkpoint.path}: expert {expert} of {target} has shape {tuple(tensor.shape[1:])} where "
                f"config.json asks for {stored}: weights and configuration do not belong together"
            )
        return (tensor[0].T if turned else tensor[0]).contiguous()

    def _convert(self, target: str, expert: int) -> torch.Tensor:
        """The part of fused parameter `target` that belongs to `expert`: shape [1, ...]."""
        sources = self._sources[target]
        converter = self.converter(next(iter(sources)))
        if converter is None:
            return self._rows(next(iter(sources.values()))[0], expert)
        merges = _merges(converter)
        for pattern, keys in sources.items():
            tensor = self.checkpoint.tensors[keys[expert]].read() if merges else self._rows(keys[0], expert)
            converter.add_tensor(target, keys[0], pattern, tensor)
        try:
            converted = converter.convert(target, model=self._one_expert, config=self.architecture.model.config)
        except (RuntimeError, ValueError) as error:
            raise ForegateError(
                f"{self.checkpoint.path}: expert {expert} of {target} does not convert: {first_line(error)}"
            ) from None
        tensor = converted[target]
        return tensor[0] if isinstance(tensor, list) else tensor

    def converter(self, pattern: str) -> WeightConverter | None:
        """A fresh copy of the conversion that takes tensors of this pattern; None if there is none."""
        for converter in self._converters:
            if pattern in converter.source_patterns:
                return deepcopy(converter)
        return None

    def _rows(self, key: str, expert: int) -> torch.Tensor:
        return self.checkpoint.tensors[key].read_row(expert)


class _OneExpertModel:
    """The model as a conversion of one expert sees it: a parameter has the shape of one expert's part."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._model.get_parameter(name)[:1]

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


def _merges(converter: WeightConverter | None) -> bool:
    """Whether the checkpoint holds one tensor per expert, which the conversion puts together."""
    return converter is not None and any(isinstance(op, MergeModulelist) for op in converter.operations)


def _dequantizer(checkpoint: Checkpoint) -> object | None:
    """transformers' quantizer for a checkpoint whose weights are MXFP4 (gpt-oss), which dequantize exactly to bf16."""
    quantization = getattr(checkpoint.config, "quantization_config", None)
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = settings.get("quant_method")
    if method != "mxfp4":
        raise ForegateError(
            f"{checkpoint.path} is quantized already ({method}): convert the model's 16-bit version instead"
        )
    from transformers import Mxfp4Config
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    return Mxfp4HfQuantizer(Mxfp4Config(dequantize=True))
