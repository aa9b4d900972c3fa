"""What the lookahead scheduler itself takes: microseconds a MoE layer, and whether that grows with the tokens.

    python benchmarks/scheduler_cost.py --json OUT

16 layers of 64 experts, top-8, gates of horizon 4 and reuse heads; routing drawn by Zipf's law with room for 90 % of the
experts, and uniformly with room for half (3.6 misses a layer). Loads are done at once. No model runs.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from foregate.schedule import Action, Cancel, Load, Prediction, Scheduler, Shape, make_scheduler

LAYERS, EXPERTS, TOP_K, HORIZON = 16, 64, 8, 4
WARM_UP, TOKENS, LATER = 100, 200, 10_000


class Run:
    """One scheduler under drawn routing, with a stopwatch on everything it is asked."""

    def __init__(self, slots: int, weights: np.ndarray) -> None:
        random, self.spent, self.loads = np.random.default_rng(0), 0.0, 0
        self.scheduler: Scheduler = make_scheduler("lookahead", slots, Shape((EXPERTS,) * LAYERS, (TOP_K,) * LAYERS))
        draw = lambda: random.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum()).tolist()  # noqa: E731
        self.routes = [[draw() for _ in range(LAYERS)] for _ in range(64)]
        self.predictions = [
            Prediction(
                layer,
                tuple(((layer + step) % LAYERS, random.random(EXPERTS) ** 6) for step in range(1, HORIZON + 1)),
                np.sort(random.random((3, EXPERTS)) * 0.5, axis=0),
            )
            for layer in range(LAYERS)
        ]

    def ask(self, event, *arguments) -> list[Action]:
        start = time.perf_counter()
        actions = list(event(*arguments))
        self.spent += time.perf_counter() - start
        return actions

    def token(self, number: int) -> float:
        """Seconds that the scheduler took for one token."""
        self.spent = 0.0
        for layer, experts in enumerate(self.routes[number % len(self.routes)]):
            now = number + layer / 100
            actions = self.ask(self.scheduler.routed, layer, experts, now)
            self.settle(actions + self.ask(self.scheduler.predicted, self.predictions[layer], now), now)
            self.settle(self.ask(self.scheduler.computed, [(layer, expert) for expert in experts], now), now)
        return self.spent

    def settle(self, actions: list[Action], now: float) -> None:
        while actions:
            match actions.pop(0):
                case Load(key=key):
                    self.loads += 1
                    actions += self.ask(self.scheduler.arrived, key, 0.01, now)
                case Cancel(key=key) if key in self.scheduler.in_flight():  # otherwise it came too late
                    actions += self.ask(self.scheduler.dropped, key, now)


def measure(name: str, slots: int, weights: np.ndarray) -> dict[str, object]:
    """Median microseconds a layer early and after 10,000 tokens."""
    run = Run(slots, weights)
    for number in range(WARM_UP):
        run.token(number)
    run.loads = 0
    early = [run.token(number) for number in range(WARM_UP, WARM_UP + TOKENS)]
    loads = run.loads / TOKENS / LAYERS
    for number in range(WARM_UP + TOKENS, LATER):
        run.token(number)
    late = [run.token(number) for number in range(LATER, LATER + TOKENS)]
    scale = 1e6 / LAYERS
    return {
        "routing": name,
        "slots": slots,
        "loads_per_layer": loads,
        "microseconds_per_layer": median(early) * scale,
        "microseconds_per_layer_after_10000_tokens": median(late) * scale,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    total = LAYERS * EXPERTS
    rows = [
        measure("zipf", int(0.9 * total), 1 / np.arange(1, EXPERTS + 1)),
        measure("uniform", total // 2, np.ones(EXPERTS)),
    ]
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
