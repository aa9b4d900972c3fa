"""The texts that the demo models' gates learn from and are judged by, made from the demo corpus.

    python examples/train_demo.py --model mixtral --out runs/mixtral --stage data
    python benchmarks/gate_texts.py runs/demo-data runs/gate-texts

Writes `train-KIND.txt`, documents evenly spread over the kind's training text, and `heldout-KIND.txt`, which neither the
models nor their gates have learned from.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_training.corpus import BOS, EOS, Corpus
from demo_training.sources import KINDS

TRAINING_BYTES = 1_000_000  # of each kind, or all there is


def main() -> None:
    """Write both texts of every kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="what train_demo.py --stage data has left")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    corpus = Corpus(arguments.corpus)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (arguments.out / f"train-{kind}.txt").write_text(training_text(corpus, kind), encoding="utf-8")
        (arguments.out / f"heldout-{kind}.txt").write_text(corpus.text("heldout", kind), encoding="utf-8")


def training_text(corpus: Corpus, kind: str) -> str:
    """Whole documents of the kind's training text, every n-th, of about TRAINING_BYTES in all."""
    tokens, begins = corpus.train_tokens(kind), corpus.tokenizer.convert_tokens_to_ids(BOS)
    documents = np.split(tokens, np.flatnonzero(tokens == begins)[1:])
    step = max(1, round(corpus.sizes[kind]["train_bytes"] / TRAINING_BYTES))
    ends = {begins, corpus.tokenizer.convert_tokens_to_ids(EOS)}
    texts = [
        corpus.tokenizer.decode([token for token in part.tolist() if token not in ends]) for part in documents[::step]
    ]
    return "\n\n".join(text.strip("\n") for text in texts)


if __name__ == "__main__":
    main()
