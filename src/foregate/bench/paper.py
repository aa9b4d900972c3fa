"""`foregate bench paper`: the comparison of Ou et al. (2025), one step of the method at a time, at each bit width.

Their abstract reports the throughput of the whole method over Mixtral-offloading's with experts at 4, 3 and 2 bits.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foregate.bench.compare import interleave, summarise
from foregate.bench.live import Setting
from foregate.bench.policies import Bench
from foregate.checkpoint.source import GATES_FILE
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.untrained import untrained_of_model
from foregate.model.loading import load

CODE, PAPER = "mixtral-offloading-code", "mixtral-offloading"
UNTRAINED, ALIGNED, SPECULATIVE = "+ lookahead gate, untrained", "+ alignment", "+ speculative scheduling"
PUBLISHED_GAINS = {4: 0.5772, 3: 0.6000, 2: 0.6226}  # by bits, over Mixtral-offloading


def bench_paper(
    benches: Sequence[Bench], memory: Sequence[str], links: Sequence[float | None], repeats: int
) -> Iterator[list[dict[str, Any]]]:
    """The ladder for every store, budget and link, one list of rows a cell.

    Raises ForegateError when the stores are not one model with gates, each at another number of bits.
    """
    stores = [Store(bench.store) for bench in benches]
    _check(stores)
    for bench, store in zip(benches, stores, strict=True):
        trained = LookaheadGates.load(store.path / GATES_FILE, store.layers)
        untrained = _untrained(bench.store, store, trained.header.horizon)
        for link in links:
            for budget in memory:
                settings = [
                    Setting(CODE, CODE, budget, link),
                    Setting(PAPER, PAPER, budget, link),
                    Setting(UNTRAINED, PAPER, budget, link, untrained),
                    Setting(ALIGNED, PAPER, budget, link, trained),
                    Setting(SPECULATIVE, "lookahead", budget, link, trained),
                ]
                runs = interleave(settings, repeats, bench.measure)
                bits = store.manifest.bits
                facts = {"store": store.path.name, "bits": bits, "memory": budget, "link_bandwidth": link}
                facts["published_gain"] = PUBLISHED_GAINS.get(bits)
                yield [{**facts, **summarise(setting.name, runs, (PAPER, CODE))} for setting in settings]


def _check(stores: Sequence[Store]) -> None:
    shapes = {tuple((layer.module, layer.num_experts, layer.top_k) for layer in store.layers) for store in stores}
    if len(shapes) > 1:
        raise ForegateError("the stores are of different models: convert one model to 4, 3 and 2 bits")
    bits = [store.manifest.bits for store in stores]
    if len(set(bits)) < len(bits):
        raise ForegateError(f"the stores have {', '.join(map(str, bits))} bits: each width may come once")


def _untrained(path: Path, store: Store, horizon: int) -> LookaheadGates:
    """The routers are the running model's own: it is loaded for a moment."""
    model = load(path, policy="lru")
    try:
        return untrained_of_model(model, store.layers, horizon)
    finally:
        model.foregate.close()
