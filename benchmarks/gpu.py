"""Everything there is to measure on a GPU, in one command for a fresh machine.

    python benchmarks/gpu.py                 # about half an hour and 60 GB of disk; --minutes bounds it
    python benchmarks/gpu.py --dry-run       # the same steps on the CPU: small models, a simulated link, no timing to trust

The demo models are inflated to the proportions of Mixtral-8x7B and Qwen3-30B-A3B (layers, experts and text stay their
own), converted to 4, 3 and 2 bits, checked against references, and timed: decoding under every policy (interleaved, the
bounds beside them, without and with experts computed on the host), prompts, everything resident, accelerate's offload,
and what memory and link of the card can do. Every result is written at once, as JSON and as a Markdown table in `--out`,
named after the card and the day: a window that closes early loses only what it cut off.
"""

import argparse
import gc
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import foregate
from foregate.bench.live import Place, Script
from foregate.bench.policies import PLACED, Bench, bench_policies
from foregate.checkpoint.inflate import inflate
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.model.generate import load_tokenizer
from foregate.report import write_report

ROOT = Path(__file__).parent.parent
CODE, PAPER = "mixtral-offloading-code", "mixtral-offloading"
POLICIES = [CODE, PAPER, "lru", "lookahead", "lookahead" + PLACED, "clairvoyant", "clairvoyant-horizon"]
AIMS = {
    ("lookahead" + PLACED, CODE): 2.0,
    ("lookahead" + PLACED, PAPER): 1.6,
    ("lookahead", "clairvoyant-horizon"): 0.9,
}
LINK_BYTES = 1 << 28  # of one pinned copy
DRY_LINK = 1e9  # bytes/s of the simulated link


@dataclass(frozen=True)
class Model:
    """A demo model and the sizes it is inflated to: those of a large model, as near as whole multiples come."""

    source: Path
    hidden: int
    ffn: int


MODELS = {
    "mixtral": Model(ROOT / "demo/mixtral-tiny", 4096, 14336),  # Mixtral-8x7B: 4096, 14336
    "qwen3": Model(ROOT / "demo/qwen3-moe-tiny", 1920, 768),  # Qwen3-30B-A3B: 2048, 768
}


class Results:
    """What has been measured so far, on disk after every step."""

    def __init__(self, folder: Path, facts: dict[str, Any], minutes: float) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", f"gpu {facts['card']} {facts['date'][:10]}".lower()).strip("-")
        self.json, self.markdown = folder / f"{name}.json", folder / f"{name}.md"
        self._facts, self._rows = facts, []  # type: dict[str, Any], list[dict[str, Any]]
        self._ends = time.monotonic() + 60 * minutes

    def step(self, name: str, measure: Callable[..., Iterator[dict[str, Any]]], *arguments: Any) -> None:
        """One step's rows. An error or the end of the time is a row as well: the other steps are still worth having."""
        if time.monotonic() > self._ends:
            self._add({"step": name, "skipped": "the time was up"})
            return
        print(f"-- {name}", flush=True)
        try:
            for row in measure(*arguments):
                self._add({"step": name, **row})
        except (ForegateError, RuntimeError, OSError) as error:
            self._add({"step": name, "error": f"{type(error).__name__}: {error}"})

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self._rows if "error" in row or row.get("passed") is False]

    def _add(self, row: dict[str, Any]) -> None:
        print({key: value for key, value in row.items() if key != "runs"}, flush=True)
        self._rows.append(row)
        write_report({**self._facts, "rows": self._rows}, self.json)
        self.markdown.write_text(as_markdown(self._facts, self._rows))


def main() -> None:
    """Run every step; exit status 1 when a check failed or a step ended with an error."""
    options = parse_arguments()
    device = "simulated" if options.dry_run else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, machine_facts(options.dry_run), options.minutes)
    results.step("bandwidth", bandwidths, options.dry_run)
    results.step("kernels", kernels, options)
    for name in options.models:
        for bits in options.bits:
            results.step(f"check {name} {bits}", checks, name, bits, options, device)
    for name in options.models:
        for bits in options.bits:
            time_model(results, name, bits, options, device)
        results.step(f"accelerate {name}", accelerate_offload, name, options)
    print(f"{results.json}\n{results.markdown}")
    sys.exit(bool(results.failed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a simulated link and the small models")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 4, 3, 2), default=[4, 3, 2])
    parser.add_argument("--memory", nargs="+", default=["12.5%", "25%", "50%"])
    parser.add_argument("--tokens", type=int, default=48, help="decoded after each prompt and counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=28, help="no step starts after so many")
    parser.add_argument("--work", type=Path, default=ROOT / "build/gpu", help="where models are made, and kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device: use --dry-run")
    return options


def time_model(results: Results, name: str, bits: int, options: argparse.Namespace, device: str) -> None:
    """All timings of one model at one width."""
    store: list[Path] = []

    def make() -> Iterator[dict[str, Any]]:
        store.append(prepare(name, bits, options, inflated=not options.dry_run))
        yield describe(store[0])

    results.step(f"model {name} {bits}", make)
    if store:
        results.step(f"decode {name} {bits}", decode, store[0], options, device)
        results.step(f"prompt {name} {bits}", prompts, store[0], options, device)


# -- models -------------------------------------------------------------------------------------------------------------


def prepare(name: str, bits: int, options: argparse.Namespace, *, inflated: bool) -> Path:
    """The store of a model at so many bits, made if it is not there."""
    checkpoint = wide_checkpoint(name, options) if inflated else MODELS[name].source
    store = options.work / f"{name}{'-wide' if inflated else ''}-{bits}.store"
    if not store.is_dir():
        foregate.convert(checkpoint, store, bits=bits)
    return store


def wide_checkpoint(name: str, options: argparse.Namespace) -> Path:
    model, wide = MODELS[name], options.work / f"{name}-wide"
    if not wide.is_dir():
        inflate(model.source, wide, hidden=model.hidden, ffn=model.ffn)
    return wide


def describe(path: Path) -> dict[str, Any]:
    store = Store(path)
    facts = {"layers": len(store.layers), "experts": store.num_experts, "record_bytes": store.record_bytes}
    return {**facts, "experts_bytes": store.num_experts * store.record_bytes, "backbone": store.manifest.backbone_bytes}


# -- checks -------------------------------------------------------------------------------------------------------------


def checks(name: str, bits: int, options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """The small model's logits on the device against the CPU's reference, and the same bits under every policy."""
    store = prepare(name, bits, options, inflated=False)
    ids = load_tokenizer(str(store))("In the beginning God created the heaven and the earth.", return_tensors="pt")
    expected = logits(store, ids, device="cpu", memory="100%", kernel="reference")
    alike: torch.Tensor | None = None
    for policy in ("lru", PAPER, "lookahead"):
        for exact in (True, False):
            found = logits(store, ids, device=device, memory="25%", policy=policy, exact=exact)
            divergence = torch.nn.functional.kl_div(
                found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
            ).item()
            row = {"policy": policy, "exact": exact, "divergence": divergence, "passed": divergence < 1e-2}
            if exact:
                alike = found if alike is None else alike
                row["same_bits"] = torch.equal(found, alike)
                row["passed"] &= row["same_bits"]
            yield row


def logits(store: Path, ids: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """float32 [tokens, vocabulary] on the host: the prompt's pass and four decode steps after it."""
    with loaded(store, **settings) as model, torch.inference_mode():
        given = ids["input_ids"].to(model.device)
        first = model(given[:, :-4], use_cache=True)
        steps, cache = [first.logits[0]], first.past_key_values
        for position in range(given.shape[1] - 4, given.shape[1]):
            out = model(given[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits[0])
        return torch.cat(steps).float().cpu()


@contextmanager
def loaded(store: Path, **settings: Any) -> Iterator[transformers.PreTrainedModel]:
    """A model that is gone afterwards."""
    model = foregate.load(store, **settings)
    try:
        yield model
    finally:
        model.foregate.close()
        del model
        free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- timings ------------------------------------------------------------------------------------------------------------


def decode(store: Path, options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Every policy with every budget; then everything resident."""
    script = Script(tokens=options.tokens)
    bench = Bench(store, script, Place(device), announce=lambda line: print(line, flush=True))
    links = [DRY_LINK if options.dry_run else None]
    for cell in bench_policies(bench, POLICIES, options.memory, links, options.repeats):
        yield from map(with_aims, cell)
    for cell in bench_policies(bench, ["lru"], ["100%"], links, options.repeats):
        yield from ({**row, "name": "all resident"} for row in cell)


def with_aims(row: dict[str, Any]) -> dict[str, Any]:
    """A policy's row, with whether it reaches what is aimed at; said, not counted as a failure."""
    met = {
        f"{other} x {aim}": row["ratios"].get(other, 0) >= aim
        for (name, other), aim in AIMS.items()
        if name == row["name"]
    }
    moved, seconds = (sum(run[key] for run in row["runs"]) for key in ("bytes_moved", "link_seconds"))
    return {**row, "aims_met": met, "link_gigabytes_per_second": moved / seconds / 1e9 if seconds else None}


def prompts(store: Path, options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Time to the first token after a long prompt, beside one pass of all experts over the link."""
    text = (ROOT / "demo/text/bible.txt").read_text("utf-8")
    ids = load_tokenizer(str(store))(text, return_tensors="pt")["input_ids"][:, : options.prompt_tokens]
    opened, link = Store(store), link_bandwidth(options.dry_run)
    one_pass = opened.num_experts * opened.record_bytes / link
    for policy in (PAPER, "lru", "lookahead"):
        pace = {"link_bandwidth": DRY_LINK} if options.dry_run else {}
        with loaded(store, device=device, memory="25%", policy=policy, exact=True, **pace) as model:
            seconds = [first_token(model, ids) for _ in range(options.repeats)]
        best = statistics.median(seconds)
        yield {
            "policy": policy,
            "prompt_tokens": ids.shape[1],
            "seconds": seconds,
            "one_pass_seconds": one_pass,
            "over_one_pass": best / one_pass,
            "aim_met": best <= 1.3 * one_pass,
        }


def first_token(model: transformers.PreTrainedModel, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        given = ids.to(model.device)
        model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=1, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def accelerate_offload(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The baseline without an expert cache: bfloat16 weights, modules moved to the card when they run."""
    if options.dry_run:
        yield {"skipped": "there is no card to offload from"}
        return
    checkpoint = wide_checkpoint(name, options)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    limits = {0: int(size * 0.25), "cpu": 100 << 30}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map="auto", max_memory=limits
    )
    ids = load_tokenizer(str(checkpoint))("And the LORD said unto Moses,", return_tensors="pt").to("cuda")
    tokens = 8
    with torch.inference_mode():
        model.generate(**ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        start = time.perf_counter()
        model.generate(**ids, max_new_tokens=1 + tokens, min_new_tokens=1 + tokens, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - start
    del model
    free_memory()
    yield {"name": "accelerate", "memory": "25%", "bits": 16, "tokens_per_second": (1 + tokens) / seconds}


# -- the card -----------------------------------------------------------------------------------------------------------


def bandwidths(dry_run: bool) -> Iterator[dict[str, Any]]:
    """What pinned copies to the card reach; the card's own memory is the kernels' step."""
    yield {"link_gigabytes_per_second": link_bandwidth(dry_run) / 1e9}


def link_bandwidth(dry_run: bool) -> float:
    """Bytes/s from pinned host memory to the card."""
    if dry_run:
        return DRY_LINK
    source = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda")
    taken = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return LINK_BYTES / statistics.median(taken)


def kernels(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """benchmarks/gpu_kernels.py in its own process: checks, bytes/s of records beside the card's own copies."""
    out = options.work / "kernels.json"
    command = [sys.executable, str(Path(__file__).with_name("gpu_kernels.py")), "--out", str(out), "--bits"]
    command += [*map(str, options.bits), "--shape", *options.models, *(["--dry-run"] if options.dry_run else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    yield {"passed": done.returncode == 0, "file": out.read_text() if out.is_file() else done.stderr[-2000:]}


def machine_facts(dry_run: bool) -> dict[str, Any]:
    """What the figures belong to."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "foregate": foregate.__version__,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dry_run": dry_run,
    }
    if dry_run:
        return {**facts, "card": "dry run", "link_bandwidth": DRY_LINK}
    query = "name,driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.max.sm,clocks.max.mem,power.limit"
    listed = subprocess.check_output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], text=True)
    values = dict(zip(query.split(","), map(str.strip, listed.splitlines()[0].split(",")), strict=True))
    return {**facts, "card": values["name"], "nvidia-smi": values, "memory_bytes": torch.cuda.mem_get_info()[1]}


def as_markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A page for people; the JSON beside it has everything."""
    lines = [
        f"# {facts['card']}, {facts['date'][:10]}",
        "",
        ", ".join(f"{key} {facts[key]}" for key in ("torch", "platform")),
    ]
    if facts["dry_run"]:
        lines += ["", "**A dry run on the CPU: these times say nothing about a card.**"]
    lines += [
        "",
        "| step | memory | setting | tokens/s | hits | link GB/s | over code variant | over paper's | of horizon's bound |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if "hit_rate" in row):
        ratios = (
            f"{row['ratios'][name]:.2f}" if name in row["ratios"] else ""
            for name in (CODE, PAPER, "clairvoyant-horizon")
        )
        speed, link = row["tokens_per_second"], row.get("link_gigabytes_per_second")
        spread = f"{speed['median']:.1f} ({speed['least']:.1f} to {speed['most']:.1f})"
        cells = (
            row["step"],
            row["memory"],
            row["name"],
            spread,
            f"{row['hit_rate']:.0%}",
            f"{link:.1f}" if link else "",
            *ratios,
        )
        lines.append("| " + " | ".join(cells) + " |")
    rest = [row for row in rows if "hit_rate" not in row and "file" not in row]
    lines += [
        "",
        *(f"- {row.pop('step')}: " + ", ".join(f"{k} {v}" for k, v in row.items()) for row in map(dict, rest)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
