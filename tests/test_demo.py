"""The trained demo model: real routing, real text, the same bytes for every budget and policy, little memory."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foregate
from foregate.checkpoint.store import Store
from foregate.model.evaluate import evaluate
from foregate.model.generate import generate, load_tokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo/mixtral-tiny"
TEXTS = sorted((ROOT / "demo/text").glob("*.txt"))
PROMPTS = ("And the LORD said unto Moses,", "def read(self, path):\n    ", "Debian ist ein Betriebssystem")


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foregate.convert(MODEL, tmp_path_factory.mktemp("demo") / "store")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_is_byte_identical_for_every_budget_and_policy(demo_store: Path, prompt: str) -> None:
    tokenizer, texts = load_tokenizer(str(demo_store)), set()
    for memory in ("2.1%", "12.5%", "25%", "50%", "100%"):
        for policy in ("demand", "lru", "mixtral-offloading", "lookahead"):
            model = foregate.load(demo_store, memory=memory, policy=policy, threads=1)
            texts.add(generate(model, tokenizer, prompt, max_new_tokens=40).text)
            model.foregate.close()
    assert len(texts) == 1
    assert len(texts.pop().strip()) > 40


def test_logits_are_byte_identical_too(demo_store: Path) -> None:
    tokenizer = load_tokenizer(str(demo_store))
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    results = []
    for memory, policy in (("2.1%", "demand"), ("25%", "lru"), ("100%", "lru")):
        model = foregate.load(demo_store, memory=memory, policy=policy, threads=1)
        with torch.inference_mode():
            results.append(model(ids).logits)
        model.foregate.close()
    assert all(torch.equal(result, results[0]) for result in results)


def test_every_kind_of_text_is_there() -> None:
    kinds = {"bible", "dictionary", "handbook-de", "handbook-en", "handbook-es", "handbook-fr", "python"}
    assert {text.stem for text in TEXTS} == kinds


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_it_predicts_held_out_text_better_than_xz(demo_store: Path, text: Path, tmp_path: Path) -> None:
    """On the same 8 KB; the bar on the whole held-out text is in demo/results."""
    excerpt = tmp_path / text.name
    excerpt.write_text(text.read_bytes()[:8192].decode(errors="ignore"))
    model = foregate.load(demo_store, memory="100%", threads=1)
    result = evaluate(model, load_tokenizer(str(demo_store)), excerpt)
    model.foregate.close()
    compressed = lzma.compress(excerpt.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    assert result.bits_per_byte < 8 * len(compressed) / result.bytes
    assert result.bits_per_byte < 2.6


@pytest.mark.parametrize("model", ["mixtral-tiny", "qwen3-moe-tiny"])
def test_committed_results_meet_the_bars(model: str) -> None:
    kinds = json.loads((ROOT / f"demo/results/{model}-heldout.json").read_text())["kinds"]
    assert len(kinds) == len(TEXTS)
    assert all(row["model_bits_per_byte"] < row["xz_bits_per_byte"] for row in kinds.values())
    assert json.loads((ROOT / f"demo/results/{model}-experts.json").read_text())["least_share_of_choices"] > 0.002


def test_lru_profits_from_learned_routing(demo_store: Path) -> None:
    """At half the experts LRU hits more often than chance would."""
    model = foregate.load(demo_store, memory="50%", threads=1)
    generate(model, load_tokenizer(str(demo_store)), PROMPTS[0], max_new_tokens=100)
    totals = model.foregate.recorder.totals()
    model.foregate.close()
    assert totals.hits / (totals.hits + totals.misses) > 0.5


@pytest.mark.parametrize(("policy", "more"), [("lru", 0), ("lookahead", 16e6)])
def test_resident_memory_stays_in_the_budget(demo_store: Path, policy: str, more: float, tmp_path: Path) -> None:
    """Backbone, KV cache and 25 % of the experts + 400 MB, over 500 tokens, the whole process counted, and as planned.

    Gates of 2 MB take some more.
    """
    report = tmp_path / "report.json"
    tests_only = ("triton", "PIL", "scipy", "dill")  # transformers imports them where they are
    users = f"import sys; sys.modules.update(dict.fromkeys({tests_only})); from foregate.cli.main import main; main()"
    command = [sys.executable, "-c", users, "generate", str(demo_store), "--prompt", PROMPTS[0]]
    options = ["--max-new-tokens", "500", "--memory", "25%", "--threads", "1", "--report", str(report)]
    options += ["--policy", policy]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = json.loads(report.read_text())["memory"]
    planned = memory["backbone_bytes"] + memory["planned"]["kv_cache"]
    bound = planned + 0.25 * Store(demo_store).experts_bytes + 400e6 + more
    assert memory["peak_resident_bytes"] < bound, f"{memory['peak_resident_bytes'] / 2**20:.0f} MiB"
    assert memory["peak_resident_bytes"] == pytest.approx(memory["planned_bytes"], rel=0.05)
