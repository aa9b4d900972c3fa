"""A scheduling policy of your own: the record used least leaves first, and a use counts half after 32 tokens.

python examples/own_policy.py [STORE]

It runs beside lru: the same text, other hits. docs/policies.md says what a policy may decide and how to test one.
"""

import sys

from transformers import AutoTokenizer

import foregate
from foregate.schedule import ExpertKey, Scheduler, Shape, register

HALF_LIFE = 32  # tokens


class DecayedFrequency(Scheduler):
    """Evicts the record with the lowest decayed number of uses."""

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        self._token = 0.0  # so far; a token uses top-k experts of every layer
        self._uses: dict[ExpertKey, tuple[float, float]] = {}  # key -> (decayed uses, token of the last)

    def used(self, key: ExpertKey) -> None:
        self._token += 1 / sum(self.shape.top_k)
        self._uses[key] = 1 + self._score(key), self._token

    def victim(self) -> ExpertKey | None:
        candidates = (key for key in self._uses if self.is_resident(key) and self.evictable(key))
        return min(candidates, key=self._score, default=None)

    def _score(self, key: ExpertKey) -> float:
        uses, token = self._uses.get(key, (0.0, self._token))
        return uses * 0.5 ** ((self._token - token) / HALF_LIFE)


register("decayed-frequency", DecayedFrequency)

store = sys.argv[1] if len(sys.argv) > 1 else "build/demo.store"
tokenizer = AutoTokenizer.from_pretrained(store)
prompt = tokenizer("And the LORD said unto Moses,", return_tensors="pt")
for policy in ("lru", "decayed-frequency"):
    model = foregate.load(store, memory="25%", policy=policy)
    tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    totals = model.foregate.recorder.totals()
    model.foregate.close()
    print(f"{policy}: {totals.hits / (totals.hits + totals.misses):.1%} hits")
    print(tokenizer.decode(tokens[0], skip_special_tokens=True), end="\n\n")
