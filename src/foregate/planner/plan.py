"""A plan: the division that `load` would make, at every bit width, with the largest context and an idea of the speed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foregate.checkpoint.backbone import BACKBONE_BITS
from foregate.checkpoint.store import UNQUANTIZED, Contents
from foregate.config import ConvertConfig, EngineConfig, PlanConfig
from foregate.errors import ForegateError
from foregate.memory.budget import Budget, divide, divide_host
from foregate.memory.needs import CPU, CUDA, Needs, Session, Tier, host_needs, needs, runtime_bytes
from foregate.model.loading import context_limit, gates_bytes
from foregate.planner.source import PlannedModel, open_model
from foregate.quantize.matrix import BITS
from foregate.schedule import POLICIES
from foregate.sizes import MIB, parse_bytes

if TYPE_CHECKING:
    from foregate.planner.speed import Figures, Speed

TIERS = {tier.name: tier for tier in (CPU, CUDA)}
WIDTHS = (UNQUANTIZED, *sorted(BITS, reverse=True))
PROBES = 6  # contexts that are tried on the way to the largest


@dataclass(frozen=True)
class Width:
    """What fits at one bit width."""

    bits: int
    experts_bytes: int  # of all records
    record_bytes: int
    slots: int | None  # None: not even one layer's experts fit
    smallest_bytes: int  # that would do
    speed: "Speed | None"


@dataclass(frozen=True)
class Plan:
    """Where every byte of a model will go. Sizes in bytes, speeds in tokens/s of decoding one sequence."""

    model: str
    class_name: str
    layers: int
    experts: int  # over all layers
    top_k: int
    device: str
    policy: str
    bits: int
    backbone_bits: int
    session: Session
    context_limit: int | None  # the model's own
    largest_context: int  # that the same memory holds, with as many experts as one layer needs
    budget: Budget  # at `bits`
    slots_by_layer: float  # on average: slots are one pool
    widths: tuple[Width, ...]
    figures: "Figures"
    speed: "Speed"

    @property
    def memory_bytes(self) -> int:
        """What the process will hold at most, on the device where there is one."""
        return self.budget.total_bytes

    @property
    def records_on_disk(self) -> int:
        """Beside a device: those that the host's memory has no room for."""
        return 0 if self.budget.host is None else self.experts - self.budget.host.records

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        budget = self.budget
        facts = {name: value for name, value in asdict(self).items() if name != "budget"}
        return facts | {
            "memory_bytes": budget.total_bytes,
            "parts": budget.needs.parts | {"slots": budget.slots_bytes},
            "loading_bytes": budget.needs.peak_loading,
            "exact": budget.needs.exact,
            "slots": budget.slots,
            "slot_bytes": budget.slot_bytes,
            "host": budget.host
            and {
                "memory_bytes": budget.host.total_bytes,
                "parts": budget.host.needs.parts | {"records": budget.host.records * budget.host.record_bytes},
                "records": budget.host.records,
            },
        }


def plan(
    model: str | Path,
    memory: str | int,
    *,
    host_memory: str | None = None,
    context: int = EngineConfig.context,
    prompt: int = EngineConfig.prompt,
    sequences: int = 1,
    bits: int | None = None,
    backbone_bits: int = ConvertConfig.backbone_bits,
    policy: str = EngineConfig.policy,
    device: str = CPU.name,
    memory_bandwidth: float | None = None,
    link_bandwidth: float | None = None,
    machine: str | Path | Mapping[str, Any] | None = None,
) -> Plan:
    """Say where a model's bytes will go, and how fast it may be, from its configuration alone.

    model: a store, a checkpoint's folder (config.json is enough) or a hub id. memory: as for `foregate.load`, of the
    device where that is not the CPU; host_memory: for records that wait in the host's memory beside it. context, prompt,
    sequences: as for `load`; the speed is that of one sequence. bits, backbone_bits: of a conversion to come; a store has
    its own. memory_bandwidth, link_bandwidth: bytes/s, for the speed, or `machine`: a file that `foregate doctor --json`
    wrote, or its content; otherwise assumed.

    Raises ForegateError when the model cannot be read or does not fit, naming what would.
    """
    if device not in TIERS:
        raise ForegateError(f"unknown device {device}: choose one of {', '.join(TIERS)}")
    if device == CPU.name and host_memory is not None:
        raise ForegateError("--host-memory is for a device with memory of its own: on the CPU --memory says it all")
    if policy not in (EngineConfig.policy, *POLICIES):
        raise ForegateError(f"unknown policy {policy}: choose one of {', '.join((EngineConfig.policy, *POLICIES))}")
    opened = open_model(model)
    bits, backbone_bits = _bits(opened, bits, backbone_bits)
    runtime_bytes()  # measured before the simulator is imported, which no run of the model needs
    from foregate.planner.speed import assumed_figures, measured_figures

    figures = measured_figures(machine, device) if machine else assumed_figures(device)
    planner = _Planner(
        opened,
        str(memory),
        host_memory,
        Session(context, prompt, sequences).within(context_limit(opened.architecture.model.config)),
        TIERS[device],
        opened.policy(policy),
        backbone_bits,
        _given(figures, memory_bandwidth, link_bandwidth),
    )
    return planner.plan(bits)


@dataclass(frozen=True)
class _Planner:
    model: PlannedModel
    memory: str
    host_memory: str | None
    session: Session
    tier: Tier
    policy: str
    backbone_bits: int
    figures: "Figures"

    def plan(self, bits: int) -> Plan:
        contents = self.contents(bits)
        budget = self.with_host(self.divide(contents, bits), contents)
        widths = tuple(self.width(each) for each in ((bits,) if self.model.store else WIDTHS))
        architecture = self.model.architecture
        return Plan(
            model=self.model.name,
            class_name=architecture.class_name,
            layers=len(contents.layers),
            experts=contents.num_experts,
            top_k=contents.top_k,
            device=self.tier.name,
            policy=self.policy,
            bits=bits,
            backbone_bits=self.backbone_bits,
            session=self.session,
            context_limit=context_limit(architecture.model.config),
            largest_context=self.largest_context(contents),
            budget=budget,
            slots_by_layer=budget.slots / len(contents.layers),
            widths=widths,
            figures=self.figures,
            speed=next(width.speed for width in widths if width.bits == bits),
        )

    @property
    def gates(self) -> int:
        return gates_bytes(self.model.folder, self.policy)

    def contents(self, bits: int) -> Contents:
        return self.model.contents(bits, self.backbone_bits)

    def needs(self, contents: Contents, session: Session) -> Needs:
        return needs(self.model.architecture, contents, session, gates=self.gates, tier=self.tier)

    def divide(self, contents: Contents, bits: int) -> Budget:
        """Raises ForegateError, naming the widths that fit, if these bits do not."""
        try:
            return divide(self.memory, contents, self.needs(contents, self.session))
        except ForegateError as error:
            others = [f"--bits {width}" for width in WIDTHS if not self.model.store and self.fits(width)]
            hint = f", or {' or '.join(others)}" if others else ""
            raise ForegateError(f"{error}{hint}") from None

    def fits(self, bits: int) -> bool:
        contents = self.contents(bits)
        try:
            divide(self.memory, contents, self.needs(contents, self.session))
        except ForegateError:
            return False
        return True

    def width(self, bits: int) -> Width:
        contents = self.contents(bits)
        needed = self.needs(contents, self.session)
        size = contents.record_bytes
        smallest = max(needed.total + contents.top_k * size, needed.peak_loading)
        try:
            budget = divide(self.memory, contents, needed)
        except ForegateError:
            return Width(bits, contents.experts_bytes, size, None, smallest, None)
        try:
            speed = self.speed(self.with_host(budget, contents), contents)
        except ForegateError:  # the host's memory has no room for a record of this width
            speed = None
        return Width(bits, contents.experts_bytes, size, budget.slots, smallest, speed)

    def with_host(self, budget: Budget, contents: Contents) -> Budget:
        """The same with the host's memory beside it, where the slots lie on a device. Raises ForegateError, see `divide_host`."""
        if self.tier.is_host:
            return budget
        beside = host_needs(self.model.architecture, self.tier, self.gates)
        return replace(budget, host=divide_host(self.host_memory, contents, beside))

    def speed(self, budget: Budget, contents: Contents) -> "Speed":
        from foregate.planner.speed import estimate

        return estimate(budget, contents, self.policy, self.figures, self.step_bytes(budget.needs))

    def step_bytes(self, needs: Needs) -> int:
        """What a decode step of one sequence reads beside experts: its cache is half full on average."""
        model = self.model.architecture.model
        embeddings = model.get_input_embeddings().weight
        tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embeddings
        unread = 0 if tied else embeddings.numel() * self.tier.dtype.itemsize  # but for one row
        return needs.backbone - unread + needs.kv_cache // (2 * self.session.sequences)

    def largest_context(self, contents: Contents) -> int:
        limit = context_limit(self.model.architecture.model.config) or self.session.context
        if "%" in self.memory:  # a share of the experts leaves the rest open
            return limit
        room = parse_bytes(self.memory, "--memory") - contents.top_k * contents.record_bytes

        def total(context: int) -> int:
            return self.needs(contents, replace(self.session, context=context)).total

        return _largest(total, room, self.session.context, limit)


def _largest(total: Callable[[int], int], room: int, fits: int, limit: int) -> int:
    """The largest context up to `limit` with total(context) <= room; total hardly bends, so a few straight lines find it."""
    beyond, at_beyond = limit, total(limit)
    if at_beyond <= room:
        return limit
    at_fits = total(fits)
    for _ in range(PROBES):
        slope = (at_beyond - at_fits) / (beyond - fits)
        guess = min(fits + int((room - at_fits) / slope), beyond - 1)
        if guess <= fits:
            break
        at_guess = total(guess)
        if at_guess <= room:
            fits, at_fits = guess, at_guess
            if room - at_guess < MIB:
                break
        else:
            beyond, at_beyond = guess, at_guess
    return fits


def _bits(model: PlannedModel, bits: int | None, backbone_bits: int) -> tuple[int, int]:
    """The bits that are planned for. Raises ForegateError for those that no conversion makes."""
    if model.store is not None:
        manifest = model.store.manifest
        if bits not in (None, manifest.bits):
            raise ForegateError(
                f"{model.name} is a store of {manifest.bits} bits: plan its checkpoint to choose others"
            )
        return manifest.bits, manifest.backbone_bits
    if bits is not None and bits not in WIDTHS:
        raise ForegateError(f"--bits {bits}: choose one of {', '.join(map(str, WIDTHS))}")
    if backbone_bits not in BACKBONE_BITS:
        raise ForegateError(f"--backbone-bits {backbone_bits}: choose one of {', '.join(map(str, BACKBONE_BITS))}")
    return bits or PlanConfig.bits, backbone_bits


def _given(figures: "Figures", memory_bandwidth: float | None, link_bandwidth: float | None) -> "Figures":
    given = {
        name: value
        for name, value in (("memory_bandwidth", memory_bandwidth), ("link_bandwidth", link_bandwidth))
        if value is not None
    }
    if not given:
        return figures
    source = "given" if len(given) == 2 else f"{' and '.join(given).replace('_', ' ')} given, the rest {figures.source}"
    return replace(figures, **given, source=source)
