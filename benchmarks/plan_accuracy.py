"""`foregate plan` against `foregate generate`: planned bytes beside the most a fresh process ever held resident.

    python benchmarks/plan_accuracy.py --store STORE --memory 1GiB,25% ... --json OUT

Each budget of each store is planned in a process of its own and run in another, which must write enough
tokens to fill its slots. Nothing here is a matter of speed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOREGATE = (sys.executable, "-m", "foregate.cli.main")
PROMPT = "And the LORD said unto Moses,"


def plan(store: Path, memory: str, report: dict[str, Any]) -> dict[str, Any]:
    """The plan for what a run did."""
    tokens = report["tokens"]["prompt"] + report["settings"]["max_new_tokens"]
    options = ["--memory", memory, "--context", str(tokens), "--prompt", str(report["tokens"]["prompt"]), "--json"]
    done = subprocess.run([*FOREGATE, "plan", str(store), *options], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run(store: Path, memory: str, prompt: str, tokens: int) -> dict[str, Any]:
    """The report of a run that writes so many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        options = ["--memory", memory, "--max-new-tokens", str(tokens), "--temperature", "0.8", "--report", str(file)]
        command = [*FOREGATE, "generate", str(store), "--prompt", prompt, *options]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads(file.read_text())


def compare(store: Path, memory: str, prompt: str, tokens: int) -> dict[str, Any]:
    report = run(store, memory, prompt, tokens)
    planned, peak = plan(store, memory, report), report["memory"]["peak_resident_bytes"]
    row = {
        "store": store.name,
        "memory": memory,
        "prompt_tokens": report["tokens"]["prompt"],
        "new_tokens": report["tokens"]["generated"],
        "slots": planned["slots"],
        "slots_of_the_run": report["memory"]["slots"],
        "planned_bytes": planned["memory_bytes"],
        "peak_resident_bytes": peak,
        "ratio": planned["memory_bytes"] / peak,
        "parts": planned["parts"],
    }
    print(
        f"{row['store']}, --memory {memory}, {row['prompt_tokens']} + {row['new_tokens']} tokens: planned "
        f"{row['planned_bytes'] / 2**20:,.0f} MiB, held {peak / 2**20:,.0f} MiB, ratio {row['ratio']:.3f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, action="append", required=True)
    parser.add_argument("--memory", action="append", required=True, help="budgets of the store, joined by commas")
    parser.add_argument("--long-prompt", type=Path, help="a text file; a run with its first 2,000 characters is added")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    prompts = [PROMPT, *([args.long_prompt.read_text()[:2000]] if args.long_prompt else [])]
    rows = [
        compare(store, memory, prompt, args.tokens)
        for store, budgets in zip(args.store, args.memory, strict=True)
        for memory in budgets.split(",")
        for prompt in prompts
    ]
    args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
