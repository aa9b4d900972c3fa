"""The trained demo model: real routing, real text, the same bytes for every budget and policy, little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foregate
from foregate.checkpoint.store import Store
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
        for policy in ("demand", "lru"):
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


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_it_has_learned_every_kind_of_text(demo_store: Path, text: Path) -> None:
    """Held-out bits per byte well below what counting bytes would give (above 4 for all kinds)."""
    tokenizer = load_tokenizer(str(demo_store))
    ids = tokenizer(text.read_text()[:4000], return_tensors="pt")["input_ids"][:, :512]
    model = foregate.load(demo_store, memory="100%", threads=1)
    with torch.inference_mode():
        nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    bits_per_byte = nats.item() / torch.tensor(2.0).log().item() / len(tokenizer.decode(ids[0, 1:]).encode())
    model.foregate.close()
    assert bits_per_byte < 2.6


def test_lru_profits_from_learned_routing(demo_store: Path) -> None:
    """At half the experts LRU hits more often than chance would."""
    model = foregate.load(demo_store, memory="50%", threads=1)
    generate(model, load_tokenizer(str(demo_store)), PROMPTS[0], max_new_tokens=100)
    totals = model.foregate.recorder.totals()
    model.foregate.close()
    assert totals.hits / (totals.hits + totals.misses) > 0.5


def test_resident_memory_stays_in_the_budget(demo_store: Path, tmp_path: Path) -> None:
    """Backbone + 25 % of the experts + 400 MB, over 500 tokens, the whole process counted."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "foregate.cli.main", "generate", str(demo_store), "--prompt", PROMPTS[0]]
    options = ["--max-new-tokens", "500", "--memory", "25%", "--threads", "1", "--report", str(report)]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = json.loads(report.read_text())["memory"]
    bound = memory["backbone_bytes"] + 0.25 * Store(demo_store).experts_bytes + 400e6
    assert memory["peak_resident_bytes"] < bound, f"{memory['peak_resident_bytes'] / 2**20:.0f} MiB"
