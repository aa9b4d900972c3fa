"""Train a demo Mixture-of-Experts language model from scratch, in a given number of minutes.

    python examples/train_demo.py --model mixtral --out runs/mixtral --minutes 106

trains on text of Debian packages (fetched with ``apt-get download``) and of
Python's standard library, exports a folder that transformers loads, and
measures it on held-out text.  ``--stage`` runs one of these parts alone.  A
run that was stopped continues from its last checkpoint.

In ``--out``: ``model/`` (the folder), ``training.jsonl``, ``heldout.json``,
``experts.json``, ``experts.png``, ``samples.json``, ``checkpoint.safetensors``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TITLES = {"mixtral": "mixtral-tiny", "qwen3-moe": "qwen3-moe-tiny"}


def main() -> None:
    """Parse the command line and run the stages."""
    arguments = parse_arguments()
    try:
        run_stages(arguments)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"train_demo: {error}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train one of Foregate's demo models from scratch.")
    parser.add_argument("--model", choices=list(TITLES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=106.0, help="wall-clock budget of the training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data-cache", type=Path, default=Path("runs/demo-data"), help="folder of the corpus")
    parser.add_argument("--stage", choices=("all", "data", "train", "evaluate", "card"), default="all")
    return parser.parse_args()


def run_stages(arguments: argparse.Namespace) -> None:
    """Run the stage asked for, or all in order."""
    from demo_training import card, corpus, evaluate, export, heatmap, train

    name, out, cache = arguments.model, arguments.out, arguments.data_cache

    def asked(stage: str) -> bool:
        return arguments.stage in (stage, "all")

    out.mkdir(parents=True, exist_ok=True)
    if asked("data"):
        corpus.write_excerpts(corpus.Corpus(cache), cache / "excerpts")
    if asked("train"):
        train.train(name, out, arguments.minutes, arguments.device, cache)
        export.export(name, out / "checkpoint.safetensors", out / "model", cache)
    if asked("evaluate"):
        evaluate.evaluate(out / "model", out, cache)
        heatmap.draw(TITLES[name], out / "experts.json", out / "experts.png")
    if asked("card"):
        card.write(name, TITLES[name], out, cache)


if __name__ == "__main__":
    main()
