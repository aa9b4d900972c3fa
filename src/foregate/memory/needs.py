"""What a model needs in memory beside its experts, part by part, before anything of it is loaded."""

import functools
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from foregate.checkpoint.architecture import Architecture
from foregate.checkpoint.store import Contents
from foregate.config import EngineConfig
from foregate.errors import ForegateError
from foregate.memory.device import Device
from foregate.memory.footprint import Footprint, footprint
from foregate.memory.process import resident_bytes
from foregate.sizes import MIB, format_bytes

GROWTH_BYTES = 24 * MIB  # what PyTorch and transformers come to hold beside a model after it was planned, measured
LOADED_AT_ONCE = 4  # tensors that transformers reads side by side, in the file's precision
GATES_WHILE_READ = 3  # copies of the gates in memory while they are read and packed
KERNEL_TOKENS = 128  # that the native kernels take at a time


@dataclass(frozen=True)
class Tier:
    """The memory that backbone, KV cache and slots lie in."""

    name: str
    dtype: torch.dtype  # of weights that are not quantized, and of activations
    context_bytes: int = 0  # that its driver takes of it in every process
    staging_bytes: int = 0  # of host memory through which records pass on their way to it

    @property
    def is_host(self) -> bool:
        """Whether it is the machine's own memory."""
        return self.name == CPU.name

    @classmethod
    def of(cls, device: Device) -> "Tier":
        """A device's own memory."""
        return CUDA if device.torch_device.type == CUDA.name else SIMULATED


CPU = Tier("cpu", torch.float32)
CUDA = Tier("cuda", torch.bfloat16, context_bytes=512 * MIB, staging_bytes=32 * MIB)
SIMULATED = Tier("simulated", torch.float32)


@dataclass(frozen=True)
class Session:
    """What a model is asked for: how many sequences at a time, and how long."""

    context: int = EngineConfig.context  # tokens of prompt and reply together
    prompt: int = EngineConfig.prompt  # of a prompt, taken in by one pass
    sequences: int = 1

    def __post_init__(self) -> None:
        if min(self.context, self.prompt, self.sequences) < 1:
            raise ForegateError(
                f"a context of {self.context} tokens, prompts of {self.prompt}, {self.sequences} at a time: at least 1 each"
            )

    def within(self, limit: int | None) -> "Session":
        """The same, no longer than a model's own limit."""
        context = self.context if limit is None else min(self.context, limit)
        return Session(context, min(self.prompt, context), self.sequences)


@dataclass(frozen=True)
class Needs:
    """Bytes in one memory. All but `loading` stay or come back as long as the model is used."""

    runtime: int  # Python, PyTorch, transformers and what else the process held; on a device its driver
    backbone: int  # everything but the experts: quantized matrices as packed, the rest in the compute dtype
    gates: int
    kv_cache: int
    transients: int  # the most that a pass holds at once beside its weights
    buffers: int  # through which records pass
    loading: int  # beside runtime and backbone, while the backbone and the gates are read; gone before slots fill
    exact: bool = True  # False: KV cache and transients are estimated, on the safe side

    @property
    def total(self) -> int:
        """Bytes beside the slots, once the model is loaded."""
        return sum(self.parts.values())

    @property
    def peak_loading(self) -> int:
        """The most while the model is loaded."""
        return self.runtime + self.backbone + self.loading

    @property
    def parts(self) -> dict[str, int]:
        """What `total` is the sum of."""
        return {name: value for name, value in asdict(self).items() if name not in ("loading", "exact")}

    def describe(self) -> str:
        """In words, the largest part first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name.replace('_', ' ')} {format_bytes(nbytes)}" for name, nbytes in parts if nbytes)


def needs(
    architecture: Architecture, contents: Contents, session: Session, *, gates: int = 0, tier: Tier = CPU
) -> Needs:
    """What a model needs in the memory that its slots lie in. gates: bytes of the lookahead gates that it runs with.

    contents: of its store, be it there or not (`outline`). The runtime is what this process holds when it is first
    asked, so the libraries that will run the model should have been imported.
    """
    pass_bytes = _footprint(architecture, session, tier)
    host = tier.is_host
    return Needs(
        runtime=runtime_bytes() if host else tier.context_bytes,
        backbone=backbone_bytes(architecture, contents, tier),
        gates=gates if host else 0,
        kv_cache=pass_bytes.kv_cache,
        transients=pass_bytes.transients + (_kernel_bytes(contents) if host else 0),
        buffers=0,  # records are read straight into slots, or copied into them from the host's buffers
        loading=_loading_bytes(architecture, gates) if host else 0,
        exact=pass_bytes.exact,
    )


def host_needs(architecture: Architecture, tier: Tier, gates: int = 0) -> Needs:
    """What a model on a device of its own needs in the host's memory, beside the records kept there."""
    loading = _loading_bytes(architecture, gates)
    return Needs(runtime_bytes(), 0, gates, 0, 0, tier.staging_bytes, loading)


def backbone_bytes(architecture: Architecture, contents: Contents, tier: Tier) -> int:
    """Bytes of everything but the experts; tied weights count once. Quantized matrices lie as packed in the host's memory,
    and dequantized on a device.
    """
    model = architecture.model
    elsewhere = {f"{layer.name}.{name}" for layer in architecture.layers for name in layer.params}
    if tier.is_host:
        elsewhere |= {f"{matrix.module}.weight" for matrix in contents.matrices}
    plain = ((name, param) for name, param in model.named_parameters() if name not in elsewhere)
    packed = contents.matrices_bytes if tier.is_host else 0
    return packed + sum(p.numel() * parameter_dtype(model, name, tier.dtype).itemsize for name, p in plain)


def parameter_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter is held in, in a model of `dtype`: some the family keeps in float32."""
    kept = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(f".{part}." in f".{name}." for part in kept) else dtype


@functools.cache
def runtime_bytes() -> int:
    """What this process holds before any model, and what its libraries will come to hold beside one.

    Measured once, so that all models of a process are planned alike.
    """
    step = 4 * MIB
    return -(-(resident_bytes() + GROWTH_BYTES) // step) * step


def _loading_bytes(architecture: Architecture, gates: int) -> int:
    elsewhere = {f"{layer.name}.{name}" for layer in architecture.layers for name in layer.params}
    sizes = (p.numel() * 2 for name, p in architecture.model.named_parameters() if name not in elsewhere)
    return max(sum(sorted(sizes)[-LOADED_AT_ONCE:]), GATES_WHILE_READ * gates)


def _kernel_bytes(contents: Contents) -> int:
    """Room of the native kernels: inputs, products of the first matrix and activations of some tokens, in float32."""
    widest = max(
        sum(param.shape[0] + param.shape[-1] for param in n.layout.params if len(param.shape) == 2)
        for n in contents.layers
    )
    return KERNEL_TOKENS * widest * torch.float32.itemsize


_footprints: dict[tuple, Footprint] = {}


def _footprint(architecture: Architecture, session: Session, tier: Tier) -> Footprint:
    """Remembered by configuration: a process often loads a model again."""
    key = (architecture.model.config.to_json_string(), session, tier.dtype)
    if key not in _footprints:
        _footprints[key] = footprint(architecture, session.context, session.prompt, tier.dtype, session.sequences)
    return _footprints[key]
