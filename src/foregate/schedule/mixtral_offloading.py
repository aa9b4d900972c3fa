"""Mixtral-offloading (arXiv 2312.17238), the baseline: once as its paper describes it, once as its public code is.

Both keep an LRU cache of equal size for every layer. The paper adds guesses for the next layer, in four staging buffers
that come out of the same memory; the code has none, but copies every evicted record back. Where a layer's share is
smaller than what one token needs of it, misses wait for each other; the paper's version may use its staging buffers then.
"""

from collections import OrderedDict
from collections.abc import Collection

from foregate.schedule.base import NEXT_ROUTER, Action, ExpertKey, Load, Prediction, Scheduler, Shape

GUESSES = 2  # "one or two" a layer
STAGING = 4


def equal_shares(slots: int, layers: int) -> list[int]:
    """Slots of each layer's cache; at least one, even beyond the budget."""
    share, rest = divmod(max(slots, 0), layers)
    return [max(1, share + (layer < rest)) for layer in range(layers)]


class MixtralOffloadingCodeScheduler(Scheduler):
    """`mixtral-offloading-code`: per-layer LRU; each miss also copies the evicted, unchanged, record back."""

    one_pool = False
    staging = 0

    def __init__(self, slots: int, shape: Shape) -> None:
        self._capacity = equal_shares(slots, shape.layers)
        self._swapped: ExpertKey | None = None  # what the load to come takes the place of
        super().__init__(sum(self._capacity) + self.staging, shape)
        self._cached: list[OrderedDict[ExpertKey, None]] = [OrderedDict() for _ in shape.experts]  # oldest first

    def used(self, key: ExpertKey) -> None:
        self._cached[key[0]][key] = None
        self._cached[key[0]].move_to_end(key)

    def evicted(self, key: ExpertKey) -> None:
        self._cached[key[0]].pop(key, None)

    def victim(self) -> ExpertKey | None:
        """None: `demand_slot` looks among the records of the layer at work."""
        return None

    def demand_slot(self, key: ExpertKey) -> int | None:
        cached = self._cached[key[0]]
        if len(cached) >= self._capacity[key[0]]:
            oldest = self._oldest(key[0])
            if oldest is None:
                return None
            self._evict(oldest)
            self._swapped = oldest
        else:
            self._swapped = None
        return self._free.pop()

    def demand_load(self, key: ExpertKey, slot: int) -> Load:
        return Load(key, slot, back=self._swapped)

    def check_integrity(self) -> None:
        super().check_integrity()
        assert all(len(cached) <= most for cached, most in zip(self._cached, self._capacity, strict=True))

    def _oldest(self, layer: int) -> ExpertKey | None:
        return next((key for key in self._cached[layer] if self.evictable(key)), None)


class MixtralOffloadingScheduler(MixtralOffloadingCodeScheduler):
    """`mixtral-offloading`: per-layer LRU, and two guesses for the next layer once this layer's loads are done.

    Guesses lie in staging buffers, evict nothing from the cache and enter it only when they are used.
    """

    staging = STAGING
    told_by = NEXT_ROUTER

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots - STAGING, shape)
        self._staged: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first
        self._guesses: list[ExpertKey] = []
        self._tokens = 1

    def routed(self, layer: int, experts: object, now: float = 0.0, tokens: int = 1) -> list[Action]:
        self._guesses, self._tokens = [], tokens
        return super().routed(layer, experts, now, tokens)

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        if self._tokens == 1 and prediction.ahead:
            layer, probabilities = prediction.ahead[0]
            best = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert])[:GUESSES]
            self._guesses = [(layer, expert) for expert in best]
        return self._go_on(now)

    def wants_predictions(self) -> bool:
        return True

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        self._needed.difference_update(keys)
        for key in keys:
            if key in self._staged:
                self._admit(key)
        return self._go_on(now)

    def next_prefetch(self, now: float) -> ExpertKey | None:
        while self._guesses and self._guesses[0] in self._slot_of:
            self._guesses.pop(0)
        return self._guesses.pop(0) if self._guesses else None

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        return self._stage(key)

    def demand_slot(self, key: ExpertKey) -> int | None:
        slot = super().demand_slot(key)
        return self._stage(key) if slot is None else slot

    def demand_load(self, key: ExpertKey, slot: int) -> Load:
        return Load(key, slot)

    def used(self, key: ExpertKey) -> None:
        if key not in self._staged:
            super().used(key)

    def evicted(self, key: ExpertKey) -> None:
        super().evicted(key)
        self._staged.pop(key, None)

    def check_integrity(self) -> None:
        super().check_integrity()
        assert len(self._staged) <= self.staging

    def _stage(self, key: ExpertKey) -> int | None:
        if len(self._staged) >= self.staging:
            oldest = next((held for held in self._staged if self.evictable(held)), None)
            if oldest is None:
                return None
            self._evict(oldest)
        self._staged[key] = None
        return self._free.pop()

    def _admit(self, key: ExpertKey) -> None:
        """A staged record was used: it takes the place of its layer's oldest in the cache."""
        cached = self._cached[key[0]]
        if len(cached) >= self._capacity[key[0]]:
            oldest = self._oldest(key[0])
            if oldest is None:  # all in use: it stays where it is
                return
            self._evict(oldest)
        del self._staged[key]
        cached[key] = None
