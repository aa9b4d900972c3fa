"""`lookahead`: eviction by expected use, as the lookahead gates and reuse heads see it.

The record that is least expected leaves first, the least recently used among equals. Without predictions this is LRU.
"""

from collections.abc import Sequence

from foregate.schedule.base import ExpertKey
from foregate.schedule.lru import LruScheduler


class LookaheadScheduler(LruScheduler):
    """LRU that protects what is expected: by reuse since the layer last ran, and by the gates of the layers before."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._reuse: dict[int, Sequence[float]] = {}  # layer -> expected uses of each expert, by its latest call
        self._ahead: dict[int, Sequence[float]] = {}  # layer -> probability of each expert in its next call

    def reuse_expected(self, layer: int, uses: Sequence[float]) -> None:
        """After a call of `layer`: how often each of its experts is expected to be used by the tokens to come."""
        self._reuse[layer] = uses
        self._ahead.pop(layer, None)  # it was about this very call

    def choice_expected(self, layer: int, probabilities: Sequence[float]) -> None:
        """The next call of `layer` will choose each of its experts with this probability."""
        self._ahead[layer] = probabilities

    def victim(self) -> ExpertKey | None:
        return min(filter(self.evictable, self._recency), key=self._expected, default=None)

    def _expected(self, key: ExpertKey) -> float:
        layer, expert = key
        reuse, ahead = self._reuse.get(layer), self._ahead.get(layer)
        return (reuse[expert] if reuse else 0.0) + (ahead[expert] if ahead else 0.0)
