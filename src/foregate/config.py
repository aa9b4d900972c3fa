"""Every default lives here, once; the command line reads them from these dataclasses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvertConfig:
    """How a checkpoint becomes a store."""

    bits: int = 16  # bits per expert weight; 16 keeps the checkpoint's own precision
    quantizer: str | None = None  # for 8, 4, 3 and 2 bits; None is the best one, with a trace or without
    backbone_bits: int = 16  # bits per weight of attention, shared experts and dense layers; 16 as above


@dataclass(frozen=True)
class CacheConfig:
    """How a checkpoint named instead of a store is converted, once, into the cache."""

    bits: int = 4  # the least that costs hardly any quality: who names a checkpoint wants it to run here


@dataclass(frozen=True)
class InflateConfig:
    """How an inflated checkpoint is written."""

    shard_bytes: int = 2 << 30  # of tensors in one file


@dataclass(frozen=True)
class EngineConfig:
    """How a store is run."""

    memory: str = "25%"  # a share of the experts, or bytes for all that the process holds
    context: int = 4096  # tokens of prompt and reply together, if the model's own limit is not smaller
    prompt: int = 512  # tokens of a prompt that one pass takes in
    policy: str = "auto"  # lookahead where the store has gates, otherwise lru
    readers: int = 2  # threads that read records; more only add latency on one disk
    threads: int = 0  # threads that compute; 0 is one per core
    kernel: str = "auto"  # the fastest that works here
    exact: bool = False  # quantized experts: keep activations in float32 instead of int8
    link_bandwidth: float | None = None  # bytes/s: records are loaded as if over a slower link
    link_latency: float = 0.0  # seconds that each record takes beside its bytes
    device: str = "cpu"  # cpu, cuda, simulated, or auto for cuda where there is a card
    eager: bool = False  # do not capture the backbone's decode steps on a card
    host_memory: str | None = None  # bytes for records, where experts are computed on a device; None is all of them


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    prompt_piece: int = 2048  # tokens of a prompt computed at a time: a pass's memory grows with them, loads shrink
    seed: int = 0


@dataclass(frozen=True)
class ReportConfig:
    """What a report holds, and what `foregate plot` draws of it."""

    events: int = 10_000  # of the time line: the last ones
    tokens: int = 2  # that the picture of the time line shows
    formats: str = "png"


@dataclass(frozen=True)
class ChatConfig:
    """How `foregate chat` replies; temperature and top-p are the model's own where nothing else is said."""

    max_new_tokens: int = 512
    context: int = 8192  # tokens of history and reply together, if the model's own limit is not smaller


@dataclass(frozen=True)
class DemoConfig:
    """What `foregate demo` runs; paths are relative to the project's folder."""

    model: str = "demo/mixtral-tiny"
    store: str = "build/demo.store"
    prompt: str = "And the LORD said unto Moses,"
    max_new_tokens: int = 200
    threads: int = 1  # its matrices are too small to share
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 7


@dataclass(frozen=True)
class EvaluateConfig:
    """How a text is cut for evaluation, in tokens."""

    window: int = 512
    stride: int = 256


@dataclass(frozen=True)
class TraceConfig:
    """How a text is cut for a trace."""

    window: int = 512  # tokens of a sequence, special tokens at its start included
    max_tokens: int = 0  # over all texts; 0 is no limit
    generate: int = 0  # tokens the model writes itself after the first half of each window
    seed: int = 0  # of what it writes
    journal_seconds: float = 20.0  # between notes of what is on disk for good


@dataclass(frozen=True)
class AlignConfig:
    """How lookahead gates are trained."""

    horizon: int = 3  # MoE layers ahead
    width: int | None = None  # of each gate's MLP; None: as wide as `share` allows
    share: float = 0.05  # of the backbone's parameters, learned over all gates
    max_width: int = 120  # keeps the gates' operations within 2 % of a large backbone's, over 4,096 tokens of context
    max_tokens: int = 250_000  # of the trace; 0 is no limit
    epochs: int = 6
    batch: int = 512  # tokens a step
    least_batch: int = 32  # a short trace gets smaller steps, down to this size,
    least_steps: int = 40  # until an epoch has so many
    learning_rate: float = 6e-3
    device: str = "cpu"  # that trains: cpu, cuda, or auto for cuda where there is one
    seed: int = 0


@dataclass(frozen=True)
class EvaluateGatesConfig:
    """How lookahead gates are judged."""

    max_tokens: int = 20_000  # of texts; a trace is used whole
    thresholds: tuple[float, ...] = (0.5, 0.8)  # probabilities from which an expert counts as foreseen for sure
    bins: int = 10  # of probability, for the calibration


@dataclass(frozen=True)
class SimulateConfig:
    """What `foregate simulate` simulates, and the machine where nothing else is said. Times in seconds."""

    memory: str = "12.5%,25%,50%,75%"
    tokens: int = 512  # of the trace, from its start; 0 is all
    warm_up: int = 64  # tokens before counting starts
    link_latency: float = 0.0
    layer_time: float = 0.001
    expert_time: float = 0.002
    token_time: float = 0.002
    gate_time: float = 0.0001


@dataclass(frozen=True)
class BenchConfig:
    """How policies are compared live."""

    memory: str = "12.5%,25%,50%,75%"
    paper_memory: str = "25%,50%"
    tokens: int = 64  # written after each prompt and measured
    warm_up: int = 8  # tokens after each prompt that are not
    repeats: int = 3
    temperature: float = 0.8  # greedy text of a small model soon repeats itself, and so do its experts
    top_p: float = 0.95
    seed: int = 0
    foreign_load: float = 0.1  # share of all cores from which other programs spoil a timing


@dataclass(frozen=True)
class CpuConfig:
    """A machine without a card, where `foregate plan` is not told of one. Bytes/s and seconds; docs/plan.md says where from."""

    memory_bandwidth: float = 30e9  # of a desktop's memory, by two threads
    link_bandwidth: float = 2e9  # of the disk
    link_latency: float = 1e-4
    reached: float = 0.5  # of the memory's bandwidth, by matrix-vector kernels between all else that a step does
    layer_seconds: float = 0.0015  # of a layer beside reading its weights: Python, small operations, the scheduler
    token_seconds: float = 0.003  # of a token beside its layers
    gate_seconds: float = 0.0004  # of a prediction


@dataclass(frozen=True)
class CardConfig:
    """A card, for `foregate plan` and `foregate simulate --machine`. Assumed: none has been measured; docs/plan.md says why so."""

    memory_bandwidth: float = 360e9  # of a consumer card's own memory
    link_bandwidth: float = 24e9  # PCIe 4, 16 lanes
    link_latency: float = 1e-5  # fixed cost of a copy from pinned memory
    reached: float = CpuConfig.reached
    layer_seconds: float = (
        0.0003  # of a layer beside reading its weights: launches, the wait for its router, the scheduler
    )
    token_seconds: float = CpuConfig.token_seconds
    gate_seconds: float = 0.0002  # of a prediction, made by the host before it launches a layer's experts


@dataclass(frozen=True)
class PlanConfig:
    """What `foregate plan` plans for, and how it simulates."""

    bits: int = 4  # of a conversion to come
    warm_up: int = 32  # tokens that are simulated before counting starts
    uncertainty: float = 0.25  # of a speed, beside what routings differ by


@dataclass(frozen=True)
class DoctorConfig:
    """How much `foregate doctor` measures, in bytes and seconds, and what it calls little."""

    memory_bytes: int = 256 << 20  # larger than any cache
    memory_seconds: float = 1.0
    disk_bytes: int = 2 << 30  # at most, of a store's own file
    scratch_bytes: int = 256 << 20  # of the file that is written where there is no store
    disk_seconds: float = 3.0  # of reading, and of writing
    latency_reads: int = 64
    link_bytes: int = 256 << 20
    slow_disk: float = 500e6  # bytes/s, below which a disk is named as the bottleneck
    little_space: int = 5 << 30  # bytes free
    little_locked: int = 1 << 30  # bytes that may be pinned


@dataclass(frozen=True)
class ServeConfig:
    """How a store is served over HTTP."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_running: int = 8  # replies that advance together
    max_waiting: int = 64  # replies that wait for their turn; more are refused
    context: int = 8192  # tokens of prompt and reply together, if the model's own limit is not smaller
    prompt_chunk: int = 512  # tokens of a prompt computed between two steps of the running replies
    max_body_bytes: int = 2 * 2**20
    max_connections: int = 256
    stalled_seconds: float = 30.0  # a client that sends no request, or takes no reply, for so long is disconnected
    shutdown_seconds: int = 30  # granted to running replies when the server is stopped
    retry_after_seconds: int = 2  # what a refused client is told
    rate_seconds: float = 10.0  # of the past that tokens/s is taken over
