"""How much continuous batching pays: total tokens/s of several replies at once over those of one, in turns.

    python benchmarks/serving.py STORE [--memory 25%] [--together 8] [--tokens 64] [--rounds 5]

The same prompts are served by the batcher alone, without HTTP: first one after the other, then together. Prints a line per
round and ends with one line of JSON. Run it on a quiet machine.
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import foregate
from foregate.config import EngineConfig, ServeConfig
from foregate.model.generate import load_tokenizer
from foregate.serve.batcher import Batcher
from foregate.serve.sampling import Sampling
from foregate.serve.sequence import Order

TEXT = (
    "And it came to pass in those days, that there went out a decree. def read(self, path): return open(path).read() "
)


def serve(batcher: Batcher, orders: list[Order]) -> float:
    """Tokens/s over all orders, submitted at once: decoding, with the prompts' passes before."""
    done, finished = [], threading.Event()

    def emit(piece) -> None:
        if piece.last:
            done.append(piece.generated)
            if len(done) == len(orders):
                finished.set()

    start = time.perf_counter()
    batcher.reserve(len(orders))
    for order in orders:
        batcher.submit(order, emit)
    finished.wait()
    return sum(done) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--memory", default=EngineConfig.memory)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", type=int, default=ServeConfig.max_running)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = foregate.load(options.store, memory=options.memory, threads=options.threads)
    tokenizer = load_tokenizer(str(options.store))
    batcher = Batcher(model, tokenizer, max_running=options.together)
    orders = [
        Order(tuple(tokenizer(TEXT[i * 5 :])["input_ids"][:16]), options.tokens, Sampling(temperature=1.0, seed=i))
        for i in range(options.together)
    ]
    rounds = []
    for number in range(options.rounds):
        alone = statistics.mean(serve(batcher, [order]) for order in orders[:3])
        together = serve(batcher, orders)
        rounds.append({"alone": alone, "together": together, "ratio": together / alone})
        print(f"round {number}: alone {alone:.1f}, {options.together} together {together:.1f} tokens/s")
    batcher.close()
    model.foregate.close()
    ratio = statistics.median(r["ratio"] for r in rounds)
    print(json.dumps({**{k: str(v) for k, v in vars(options).items()}, "ratio": ratio, "rounds": rounds}))


if __name__ == "__main__":
    main()
