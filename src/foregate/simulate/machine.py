"""A machine as the simulator knows it: a link and a processor, in seconds and bytes."""

from dataclasses import dataclass

from foregate.memory.link import paced_chunk_bytes


@dataclass(frozen=True)
class Machine:
    """Durations in seconds, sizes in bytes."""

    record_bytes: int
    link_bandwidth: float  # bytes/s
    link_latency: float = 0.0  # fixed cost of a record
    chunk_bytes: int = 1 << 20  # that the link moves without looking for something more urgent
    paced: bool = True  # whether it is slowed down to its bandwidth: then its chunks are as short as the engine's
    readers: int = 2  # chunks claimed at a time: the one at work and those to follow it
    layer_seconds: float = 0.0  # attention, router and all that is not experts, one layer and token
    expert_seconds: float = 0.0  # one expert on one token
    call_seconds: float = 0.0  # fixed cost of one kernel call, whatever its experts
    token_seconds: float = 0.0  # embedding, head, sampling
    start_seconds: float = 0.0  # of them: after the token is known and gates were asked about it
    gate_seconds: float = 0.0  # one prediction

    def __post_init__(self) -> None:
        sizes_fit = self.record_bytes >= 1 and self.chunk_bytes >= 1 and self.readers >= 1 and self.link_bandwidth > 0
        if not sizes_fit or self.start_seconds > self.token_seconds:
            raise ValueError(f"no such machine: {self}")

    @property
    def load_seconds(self) -> float:
        """One record over an idle link."""
        return self.link_latency + self.record_bytes / self.link_bandwidth

    @property
    def chunk_seconds(self) -> float:
        """The time after which a load may be overtaken by a more urgent one, its share of the latency included."""
        paced = paced_chunk_bytes(self.link_bandwidth) if self.paced else self.chunk_bytes
        chunk_bytes = min(self.chunk_bytes, paced)
        return self.load_seconds * min(1.0, chunk_bytes / self.record_bytes)
