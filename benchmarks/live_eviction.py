"""What the gates are worth for eviction alone: misses beside `lru` while a model writes and nothing is fetched ahead.

    python benchmarks/live_eviction.py STORE... --json OUT

Each store needs gates. The same sampled text is written under both policies at each budget, one after the other.
"""

import argparse
import json
from pathlib import Path

import torch

import foregate
from foregate.model.generate import load_tokenizer
from foregate.schedule import ExpertKey, register
from foregate.schedule.lookahead import LookaheadScheduler

BUDGETS = ("12.5%", "25%", "50%")
PROMPTS = ("And the LORD said unto Moses,", "def read_header(path):", "Der Paketmanager")


class EvictionAlone(LookaheadScheduler):
    """`lookahead` that fetches nothing ahead, and asks the gates whether or not that is worth their time."""

    def next_prefetch(self, now: float) -> ExpertKey | None:
        return None

    def wants_predictions(self) -> bool:
        return True


def run(store: Path, memory: str, policy: str, tokens: int) -> dict:
    """Misses per token while decoding, over all prompts, and a digest of the text."""
    model, tokenizer = foregate.load(store, memory=memory, policy=policy, threads=1), load_tokenizer(str(store))
    misses, ids = 0, []
    for prompt in PROMPTS:
        torch.manual_seed(7)
        inputs = torch.tensor([tokenizer(prompt)["input_ids"]])
        counts = []

        def note(_ids: torch.Tensor, _scores: torch.Tensor, counts: list[int] = counts, **_: object) -> torch.Tensor:
            counts.append(model.foregate.recorder.totals().misses)
            return torch.zeros(len(_ids), dtype=torch.bool)  # never stops; called after every token

        written = model.generate(
            inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            pad_token_id=0,
            stopping_criteria=[note],
        )
        misses += counts[-1] - counts[0]  # the first count is the prompt's
        ids += written[0].tolist()
    model.foregate.close()
    return {"policy": policy, "misses_per_token": misses / (len(PROMPTS) * (tokens - 1)), "ids": hash(tuple(ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=256, help="written after each prompt")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    register("eviction-alone", EvictionAlone)
    rows = []
    for store in args.stores:
        for memory in BUDGETS:
            lru, gates = (run(store, memory, policy, args.tokens) for policy in ("lru", "eviction-alone"))
            assert lru.pop("ids") == gates.pop("ids"), "the text depends on the policy"
            rows += [{"store": store.name, "memory": memory, **row} for row in (lru, gates)]
            print(rows[-2], rows[-1], flush=True)
    args.json.write_text(json.dumps({"tokens": args.tokens, "prompts": PROMPTS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
