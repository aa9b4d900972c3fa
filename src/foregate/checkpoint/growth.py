"""Which dimensions of a checkpoint's tensors grow when its model is inflated, and how.

Nothing is decided by a tensor's name. The family's own code builds the model from its configuration and from one with
two sizes changed; a dimension that follows the hidden size or the experts' inner size shows it by what it became. The
shares (see `widen`) then go where a factor works for every reader at once:

- the hidden state is repeated as it is. A norm's mean of squares does not notice; its gain carries the shares, so each
  sum over the hidden dimension behind a norm (attention, router, experts, head) gives what it gave before;
- the inner values of an expert are repeated as they are, and the columns of its down projection carry the shares.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.core_model_loading import Concatenate, MergeModulelist

from foregate.checkpoint.architecture import Architecture, inspect_architecture
from foregate.checkpoint.expert_reader import ExpertReader
from foregate.checkpoint.source import Checkpoint
from foregate.checkpoint.widen import Axes, Axis, wide_shape
from foregate.errors import ForegateError

# Families whose hidden state meets a norm with a plain gain before everything that reads it, and whose code derives
# nothing else from the two sizes: what tests/checkpoint/test_inflate.py proves by comparing logits.
FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "minimax_m2",
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)
INNER_NAMES = ("moe_intermediate_size", "intermediate_size")  # the experts' inner size: the first that is there
HIDDEN, INNER = "hidden", "inner"
PROBES = {HIDDEN: 3, INNER: 5}  # a dimension that grows so much when both sizes do shows which of them it follows


@dataclass(frozen=True)
class Size:
    """One of the two sizes that grow."""

    name: str  # in config.json
    small: int
    wide: int

    @property
    def copies(self) -> int:
        return self.wide // self.small


class Growth:
    """How the model of `checkpoint` becomes one of hidden size `hidden` and experts' inner size `ffn`.

    Raises ForegateError when these are no multiples of the model's own sizes, or the family is not one whose function
    is known to stay the same.
    """

    def __init__(self, checkpoint: Checkpoint, hidden: int, ffn: int) -> None:
        config = checkpoint.config
        if config.model_type not in FAMILIES:
            raise ForegateError(
                f"{checkpoint.path}: model_type {config.model_type} cannot be inflated, for only {', '.join(FAMILIES)} "
                "are known to compute the same function afterwards: name a checkpoint of one of these"
            )
        inner_name = next(name for name in INNER_NAMES if hasattr(config, name))
        self.hidden = _size("--hidden", "hidden_size", config.hidden_size, hidden)
        self.ffn = _size("--ffn", inner_name, getattr(config, inner_name), ffn)
        self._raw = json.loads((checkpoint.path / "config.json").read_text())
        # Heads stay as they are; without this a family would derive their size from the new hidden size.
        self._raw["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._raw.pop("auto_map", None)  # a checkpoint's own code is never run
        self._type = type(config)

    def config_json(self) -> dict[str, Any]:
        """The inflated model's config.json."""
        return self._sized(self.hidden.wide, self.ffn.wide)

    def axes(self, reader: ExpertReader) -> dict[str, Axes]:
        """How each tensor of the checkpoint grows, by its key: experts and backbone, in the reader's order.

        Raises ForegateError for a tensor whose layout or growth is not understood.
        """
        probe = self._sized(self.hidden.small * PROBES[HIDDEN], self.ffn.small * PROBES[INNER])
        roles = _roles(reader.architecture, self._build(probe))
        norms = {name for name, module in reader.architecture.model.named_modules() if _is_norm(module)}
        found: dict[str, Axes] = {}
        made: dict[str, int] = defaultdict(int)  # parameter -> entries that its tensors will have
        for key, (target, pattern) in {**reader.places, **reader.expert_places}.items():
            _check_plain(reader, key, pattern)
            shape, dims = reader.checkpoint.tensors[key].shape, roles[target]
            in_norm = target.rpartition(".")[0] in norms
            found[key] = self._axes(key, shape, dims[len(dims) - len(shape) :], in_norm)
            made[target] += prod(wide_shape(shape, found[key]))
        wide = self._build(self.config_json()).model.state_dict()
        for target, entries in made.items():
            if entries != wide[target].numel():
                raise ForegateError(f"{target} cannot be inflated: it would not fit the model that config.json builds")
        return found

    def _axes(self, key: str, shape: tuple[int, ...], roles: tuple[str | None, ...], in_norm: bool) -> Axes:
        axes: list[Axis | None] = []
        for dim, role in enumerate(roles):
            size = self.hidden if role == HIDDEN else self.ffn
            if role and shape[dim] % size.small:
                raise ForegateError(f"{key} cannot be inflated: its shape {shape} is not in units of {size.small}")
            is_input = len(shape) > 1 and dim == len(shape) - 1
            shared = in_norm if role == HIDDEN else is_input
            axes.append(Axis(size.small, size.copies, shared) if role and size.copies > 1 else None)
        return tuple(axes)

    def _sized(self, hidden: int, ffn: int) -> dict[str, Any]:
        return {**self._raw, self.hidden.name: hidden, self.ffn.name: ffn}

    def _build(self, raw: dict[str, Any]) -> Architecture:
        config: PretrainedConfig = self._type.from_dict(raw)
        return inspect_architecture(config)


def _size(option: str, name: str, small: int, wide: int) -> Size:
    if wide < small or wide % small:
        below = max(small, wide // small * small)
        nearest = f"{below} or {below + small}" if wide > small else f"{small}"
        raise ForegateError(
            f"{option} {wide} is not a multiple of the model's {name} {small}: the nearest is {nearest}"
        )
    return Size(name, small, wide)


def _roles(small: Architecture, probe: Architecture) -> dict[str, tuple[str | None, ...]]:
    """What each dimension of each parameter follows."""
    state = probe.model.state_dict()
    return {
        name: tuple(_role(name, *sizes) for sizes in zip(tensor.shape, state[name].shape, strict=True))
        for name, tensor in small.model.state_dict().items()
    }


def _role(name: str, small: int, probed: int) -> str | None:
    for role, copies in PROBES.items():
        if probed == copies * small:
            return role
    if probed != small:
        raise ForegateError(f"{name} cannot be inflated: it follows the hidden size in a way that is not understood")
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether all that a module holds is one value per entry of what it reads."""
    params = list(module.parameters(recurse=False))
    return bool(params) and all(param.dim() == 1 for param in params)


def _check_plain(reader: ExpertReader, key: str, pattern: str | None) -> None:
    """A tensor must hold whole [out, in] matrices in the model's own order."""
    converter = reader.converter(pattern) if pattern else None
    for operation in converter.operations if converter else ():
        if not isinstance(operation, (MergeModulelist, Concatenate)):
            raise ForegateError(f"{key} cannot be inflated: its checkpoint conversion is {type(operation).__name__}")
