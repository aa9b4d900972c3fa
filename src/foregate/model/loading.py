"""Loading a store as a transformers model: the backbone in memory, the experts behind an engine."""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from foregate.checkpoint.architecture import Architecture, inspect_architecture
from foregate.checkpoint.source import GATES_FILE, load_config
from foregate.checkpoint.store import MatrixInfo, Store
from foregate.checkpoint.tensors import TensorEntry, read_header
from foregate.config import EngineConfig
from foregate.engine import Engine, HostEngine
from foregate.engine.device import DeviceEngine
from foregate.errors import ForegateError, first_line
from foregate.kernels import set_threads
from foregate.memory.budget import Budget, HostBudget, divide, divide_host
from foregate.memory.device import Device
from foregate.memory.devices import open_device
from foregate.memory.limits import host_memory as free_host_memory
from foregate.memory.needs import Session, Tier, host_needs, needs
from foregate.memory.process import return_unused_memory
from foregate.model.experts import streamed_experts
from foregate.model.linear import read_matrices, with_quantized_linears
from foregate.model.on_device import capture, dequantize_linears, move
from foregate.schedule import AUTO, GATES, NEXT_ROUTER, Route, told_by

if TYPE_CHECKING:
    from foregate.lookahead.gates import LookaheadGates

MAX_THREADS = 256
LOOKAHEAD, LRU = "lookahead", "lru"  # what AUTO chooses from
_BUILDING = threading.Lock()  # class names are swapped while a model is built


def load(
    store: str | Path,
    *,
    memory: str | int = EngineConfig.memory,
    context: int = EngineConfig.context,
    prompt: int = EngineConfig.prompt,
    sequences: int = 1,
    policy: str = EngineConfig.policy,
    readers: int = EngineConfig.readers,
    threads: int = EngineConfig.threads,
    kernel: str = EngineConfig.kernel,
    exact: bool = EngineConfig.exact,
    link_bandwidth: float | None = EngineConfig.link_bandwidth,
    link_latency: float = EngineConfig.link_latency,
    device: str = EngineConfig.device,
    host_memory: str | int | None = EngineConfig.host_memory,
    eager: bool = EngineConfig.eager,
    gates: "LookaheadGates | None" = None,
    future: Sequence[Route] | None = None,
) -> PreTrainedModel:
    """Load a store as a transformers model whose experts are read on demand.

    memory: a share of the experts ("25%") or bytes ("8GiB", 8589934592) for all that is held on `device`: on the CPU what
    this process holds now, backbone, KV cache, gates, the passes' transients, and with what is left as many experts as
    fit. context, prompt, sequences: what that is to be enough for: tokens of prompt and reply together, of them those of a
    prompt that one pass takes in, and how many such sequences at a time. Longer ones work, and take more. `foregate.plan`
    says beforehand where the bytes will go.
    device: "cpu", "cuda", "auto" (cuda where there is a card, otherwise cpu), or "simulated": host memory standing for a
    device's. On a device the backbone is in bfloat16 (simulated: float32), records lie in host memory, all of them or as
    many as `host_memory` ("16GiB", "50%") has room for, and experts that are not resident are computed where that is done
    first. eager: do not capture the backbone's decode steps on a card, which takes a while at the first ones.
    policy: a name of foregate.schedule.POLICIES, yours among them (foregate.schedule.register), or "auto": "lookahead"
    where the store has gates, otherwise "lru".
    readers: threads that read; threads: threads that compute, for the whole process, 0 is one per core.
    kernel: "auto", "cpu" (native), "triton" (on a device) or "reference" (PyTorch). exact: keep activations in float32
    where the native kernel would round them to int8, with quantized experts, and compute all experts on the device.
    link_bandwidth, link_latency: bytes/s, and seconds a record, to load as if over a slower link.
    gates: to use instead of the store's, also by "mixtral-offloading", which otherwise guesses with the next layer's
    router. future: every call of a layer to come, for the bounds (foregate.schedule.BOUNDS).

    The result is an ordinary model: `generate`, pipelines and evaluation harnesses work on it; its `foregate` attribute
    is the engine. Raises ForegateError on a damaged store, a budget that is too small or more than there is, an unknown
    policy or device, or an impossible number of threads.
    """
    if not 0 <= threads <= MAX_THREADS or not 1 <= readers <= MAX_THREADS:
        raise ForegateError(f"threads={threads}, readers={readers}: 0 or 1 to {MAX_THREADS} are possible")
    opened = Store(store)
    architecture = inspect_architecture(load_config(opened.path))
    _check_match(opened, architecture)
    if threads:
        set_threads(threads)
    target = open_device(device, link_bandwidth, link_latency)
    if policy == AUTO:
        policy = LOOKAHEAD if (opened.path / GATES_FILE).is_file() else LRU
    wanted = Session(context, prompt, sequences).within(context_limit(architecture.model.config))
    gates_size = gates_bytes(opened.path, policy)
    if target is None:
        needed = needs(architecture, opened, wanted, gates=gates_size)
        budget = divide(str(memory), opened, needed, free=free_host_memory().free)
    else:
        host = _divide_host(host_memory, opened, architecture, target, gates_size, readers)
        budget = _divide_device(str(memory), opened, architecture, target, wanted, host)
    if gates is None and told_by(policy) == GATES:
        from foregate.lookahead.gates import LookaheadGates  # other policies need none of that in memory

        gates = LookaheadGates.load(opened.path / GATES_FILE, opened.layers)
    settings = {"policy": policy, "readers": readers, "kernel": kernel, "exact": exact, "future": future}
    settings |= {"link_bandwidth": link_bandwidth, "link_latency": link_latency}
    engine: HostEngine | DeviceEngine
    if target is None:
        engine = HostEngine(opened, budget, **settings)
    else:
        engine = DeviceEngine.open(opened, budget, target, dtype=Tier.of(target).dtype, **settings)
    try:
        model = _build_backbone(opened, architecture)
        _connect(model, opened, engine)
        _follow(engine, model, gates)
        if isinstance(engine, DeviceEngine):
            move(model, engine.device, engine.dtype)
            engine.backbone = None if eager else capture(model, engine.device)
            engine.fill()
    except BaseException:
        engine.close()
        raise
    model.foregate = engine
    del architecture, gates
    return_unused_memory()  # what loading needed would otherwise stay with the process
    weakref.finalize(model, engine.close)
    return model


def _divide_host(
    memory: str | int | None, store: Store, architecture: Architecture, device: Device, gates: int, readers: int
) -> HostBudget:
    """The records that wait in host memory for a device."""
    beside = host_needs(architecture, Tier.of(device), gates)
    return divide_host(memory, store, beside, least=readers, free=free_host_memory().free)


def _divide_device(
    memory: str, store: Store, architecture: Architecture, device: Device, session: Session, host: HostBudget
) -> Budget:
    """A device's memory; what its driver took of it counts as this process's, and as free before."""
    tier = Tier.of(device)
    needed = needs(architecture, store, session, tier=tier)
    return replace(divide(memory, store, needed, free=device.free_bytes + tier.context_bytes), host=host)


def _follow(engine: Engine, model: PreTrainedModel, gates: "LookaheadGates | None") -> None:
    """Have the engine told by gates, or by the guesses of its policy, what is to come."""
    if gates is not None:
        from foregate.lookahead.live import LiveGates

        engine.follow(LiveGates(gates, model, engine))
    elif told_by(engine.policy) == NEXT_ROUTER:
        from foregate.lookahead.guess import NextRouter

        engine.follow(NextRouter(model, engine.store.layers))


class _OnDemand:
    """A tensor of the backbone that is read when transformers takes it: a memory map would count as resident."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry

    def __getitem__(self, everything: object) -> torch.Tensor:
        return self._entry.read()


def _build_backbone(store: Store, architecture: Architecture) -> PreTrainedModel:
    weights = {name: _OnDemand(entry) for name, entry in read_header(store.backbone_path).items()}
    model_class = type(architecture.model)
    builder = with_quantized_linears(model_class, [matrix.module for matrix in store.matrices])
    try:
        with _BUILDING, quiet(), streamed_experts(architecture.expert_classes):
            model, info = builder.from_pretrained(
                None,
                config=architecture.model.config,
                state_dict=weights,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise _backbone_error(store.path, first_line(error)) from None
    model.__class__ = model_class
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise _backbone_error(store.path, f"{len(names)} weights are missing, first {names[0]}")
    if (store.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(store.path, local_files_only=True)
    model.name_or_path = str(store.path)
    return model.eval()


def _backbone_error(path: Path, what: str) -> ForegateError:
    return ForegateError(f"{path}: the backbone does not fit config.json ({what}): convert the model again")


def _connect(model: PreTrainedModel, store: Store, engine: Engine) -> None:
    modules = [model.get_submodule(layer.module) for layer in store.layers]
    for index, module in enumerate(modules):
        module.connect(engine, index)
    engine.connect(modules)
    if isinstance(engine, DeviceEngine):
        dequantize_linears(model, store)
    elif store.matrices:
        for info, matrix in zip(store.matrices, read_matrices(store), strict=True):
            model.get_submodule(info.module).connect(matrix, engine.kernel.product(matrix, engine.exact))


def _check_match(store: Store, architecture: Architecture) -> None:
    found = [(layer.name, layer.num_experts, layer.params) for layer in architecture.layers]
    stored = [(n.module, n.num_experts, {p.name: p.shape for p in n.layout.params}) for n in store.layers]
    if found != stored or not all(_has_linear(architecture, matrix) for matrix in store.matrices):
        raise ForegateError(
            f"{store.path}: config.json describes another model than foregate.json does: convert the model again"
        )


def _has_linear(architecture: Architecture, matrix: MatrixInfo) -> bool:
    try:
        module = architecture.model.get_submodule(matrix.module)
    except AttributeError:
        return False
    return isinstance(module, nn.Linear) and (module.out_features, module.in_features) == matrix.shape


def context_limit(config: PretrainedConfig) -> int | None:
    """The most tokens that a model was made for; None if its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def gates_bytes(folder: Path, policy: str) -> int:
    """Bytes of the lookahead gates in a model's folder, which are held as they are stored; 0 if `policy` has no use for them."""
    file = folder / GATES_FILE
    return file.stat().st_size if told_by(policy) == GATES and file.is_file() else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no advice while a backbone loads: it takes a moment, and errors are raised anyway."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
