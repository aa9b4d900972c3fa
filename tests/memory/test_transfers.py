"""Which chunk comes next, against an obvious reference; pure bookkeeping, so every order is exact."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from foregate.checkpoint.store import ExpertKey
from foregate.errors import ForegateError
from foregate.memory.transfers import Chunk, TransferQueue
from foregate.schedule import Load

STEP = 4096


def record_bytes(key: ExpertKey) -> int:
    return (key[1] % 3 + 1) * STEP + STEP // 2


def queue_of(*loads: Load) -> TransferQueue:
    queue = TransferQueue(record_bytes, STEP)
    for load in loads:
        queue.add(load, 0.0)
    return queue


def drain(queue: TransferQueue) -> list[Chunk]:
    """Claim and complete one chunk after the other."""
    chunks = []
    while chunk := queue.claim():
        chunks.append(chunk)
        queue.complete(chunk, None)
    return chunks


def test_chunks_cover_a_record_in_order() -> None:
    chunks = drain(queue_of(Load((0, 1), 0)))
    assert [(chunk.start, chunk.nbytes) for chunk in chunks] == [(0, 4096), (4096, 4096), (8192, 2048)]


def test_a_record_is_under_way_until_its_last_chunk_is_through() -> None:
    queue = queue_of(Load((0, 1), 0))
    assert (0, 1) in queue and (0, 2) not in queue
    held = queue.claim()
    drain(queue)
    assert (0, 1) in queue
    queue.complete(held, None)
    assert (0, 1) not in queue


def test_a_failed_chunk_ends_its_transfer_once_nothing_of_it_runs() -> None:
    queue = queue_of(Load((0, 2), 0), Load((0, 0), 1))
    first, second = queue.claim(), queue.claim()
    assert queue.complete(first, ForegateError("broken")) is None
    assert queue.claim().key == (0, 0)
    ended = queue.complete(second, None)
    assert ended is first.transfer and str(ended.error) == "broken" and ended.nbytes == second.nbytes


def test_own_chunks_wait_for_those_of_back_and_others_do_not() -> None:
    queue = queue_of(Load((0, 0), 0, back=(5, 0)), Load((0, 1), 1, demand=False))
    backs = [queue.claim(), queue.claim()]
    assert [chunk.key for chunk in backs] == [(5, 0), (5, 0)]
    assert queue.claim().key == (0, 1)
    queue.complete(backs[1], None)
    assert queue.claim().key == (0, 1)
    queue.complete(backs[0], None)
    assert queue.claim().key == (0, 0)


@dataclass
class Slow:
    """The reference: a list of what is left, sorted anew for every chunk."""

    loads: dict[ExpertKey, tuple[bool, int]] = field(default_factory=dict)  # key -> (is a prefetch, order)
    left: dict[ExpertKey, list[int]] = field(default_factory=dict)  # key -> chunks' starts
    clock: int = 0

    def add(self, key: ExpertKey, demand: bool) -> None:
        self.clock += 1
        self.loads[key] = (not demand, self.clock if demand else -self.clock)
        self.left[key] = list(range(0, record_bytes(key), STEP))

    def hurry(self, key: ExpertKey) -> None:
        if self.left.get(key) and self.loads[key][0]:
            self.clock += 1
            self.loads[key] = (False, self.clock)

    def claim(self) -> tuple[ExpertKey, int] | None:
        key = min((key for key in self.left if self.left[key]), key=self.loads.get, default=None)
        return None if key is None else (key, self.left[key].pop(0))


KEYS = st.tuples(st.just(0), st.integers(0, 5))
STEPS = st.one_of(
    st.tuples(st.sampled_from(["demand", "prefetch", "hurry", "cancel"]), KEYS),
    st.tuples(st.sampled_from(["claim", "complete"]), st.integers(0, 3)),
)


@given(st.lists(STEPS, max_size=60))
def test_any_operations_give_the_order_of_the_reference(steps: list[tuple]) -> None:
    queue, slow = TransferQueue(record_bytes, STEP), Slow()
    running: list[Chunk] = []
    under_way: set[ExpertKey] = set()

    def complete(chunk: Chunk) -> None:
        if ended := queue.complete(chunk, None):
            under_way.remove(ended.load.key)
            assert ended.dropped or ended.nbytes == record_bytes(ended.load.key)

    for name, argument in steps:
        if name in ("demand", "prefetch") and argument not in under_way:
            queue.add(Load(argument, 0, demand=name == "demand"), 0.0)
            slow.add(argument, name == "demand")
            under_way.add(argument)
        elif name == "hurry":
            queue.hurry(argument)
            slow.hurry(argument)
        elif name == "cancel":
            if ended := queue.cancel(argument):
                under_way.remove(ended.load.key)
            slow.left.pop(argument, None)
        elif name == "claim":
            chunk = queue.claim()
            assert (chunk and (chunk.key, chunk.start)) == slow.claim()
            running += [chunk] if chunk else []
        elif name == "complete" and running:
            complete(running.pop(argument % len(running)))
    while chunk := running.pop() if running else queue.claim():
        complete(chunk)
    assert not under_way  # each has ended, once
