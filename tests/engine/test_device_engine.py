"""Slots on a device: the CPU's output whatever is resident, predicted, or computed on the host; and it survives errors.

The device is the simulated one: host memory stands for its memory. Its link is slowed where experts are to be computed on
the host.
"""

import gc
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import foregate
from foregate.engine import base as engine_module
from foregate.engine.host_experts import HostExperts
from foregate.errors import ForegateError
from foregate.memory import disk
from foregate.memory.simulated import SimulatedDevice
from foregate.schedule import BOUNDS, POLICIES, Call, ExpertKey

Folder = Callable[[str], Path]
FAMILIES = {  # and the bits of their experts
    "mixtral": 16,
    "qwen3_moe": 4,
    "gpt_oss": 3,
    "deepseek_v3": 2,
    "nemotron_h": 4,
    "olmoe": 3,
    "jamba": 2,
    "zaya": 16,  # has tokens without an expert
    "dots1": 4,
}
IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(3))
TOKEN = torch.tensor([[77]])
SLOW = 0.004  # seconds that the link takes for each record: several times what the host takes


@pytest.fixture(scope="session")
def stores(checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """stores(family): its store at the bits above."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("device") / family
            made[family] = foregate.convert(checkpoint(family), folder, bits=FAMILIES[family])
        return made[family]

    return make


def run(store: Path, tokens: int = 6, **options: object) -> tuple[torch.Tensor, PreTrainedModel]:
    """(logits [rows, vocabulary] of a prompt and of single tokens after it, the closed model)."""
    model = foregate.load(store, **({"memory": "50%", "threads": 1} | options))
    try:
        return logits(model, tokens), model
    finally:
        model.foregate.settle()
        model.foregate.close()


def logits(model: PreTrainedModel, tokens: int = 6) -> torch.Tensor:
    with torch.inference_mode():
        found = model(IDS[:1], use_cache=True)
        rows = [found.logits[0]]
        for step in range(tokens):
            cache = found.past_key_values
            found = model(IDS[1:, step : step + 1], past_key_values=cache, use_cache=True)
            rows.append(found.logits[0])
    return torch.cat(rows)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median relative error of the tokens after the prompt: one whose router sees a near tie may take another route."""
    found, expected = found[IDS.shape[1] :], expected[IDS.shape[1] :]
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_computes_on_the_cpu(family: str, stores: Folder) -> None:
    store = stores(family)
    expected, _ = run(store, exact=True)
    found, _ = run(store, device="simulated", memory="34%", exact=True, policy="lru")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    placed, model = run(store, device="simulated", link_latency=SLOW, policy="lru")
    assert model.foregate.recorder.totals().experts_on_host > 0
    assert error(placed, expected) < (1e-5 if FAMILIES[family] == 16 else 0.02)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_reference_kernel_computes_the_same(family: str, stores: Folder) -> None:
    expected, _ = run(stores(family), 2, exact=True)
    found, _ = run(stores(family), 2, device="simulated", kernel="reference", memory="100%", exact=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_every_policy_writes_the_same_with_placement_or_without(demo_store: Path) -> None:
    """Exact, the same bits; placed, the same up to rounding. The bounds know the future from a run that was recorded."""
    model = foregate.load(demo_store, memory="25%", policy="lru", threads=1, exact=True)
    calls = model.foregate.record_calls()
    expected = logits(model)
    model.foregate.close()
    future = [(call.layer, call.experts) for call in calls]
    for policy in [*POLICIES, *BOUNDS]:
        options = {"device": "simulated", "memory": "25%", "policy": policy, "future": future}
        exact, _ = run(demo_store, exact=True, **options)
        assert torch.equal(exact, expected), policy
        if policy in BOUNDS:
            continue
        placed, model = run(demo_store, link_latency=SLOW, **options)
        totals = model.foregate.recorder.totals()
        assert totals.experts_on_host, policy
        assert totals.bytes_read, policy
        assert error(placed, expected) < 0.02, policy


def test_counts_are_the_cpus(stores: Folder) -> None:
    """Hits, misses and bytes of `lru`, also of layers that the scheduler heard of later."""
    for memory in ("34%", "100%"):
        counts = [
            run(stores("olmoe"), memory=memory, policy="lru", exact=True, device=device)[1].foregate.recorder.totals()
            for device in ("cpu", "simulated")
        ]
        assert (counts[0].hits, counts[0].misses, counts[0].bytes_read) == (
            counts[1].hits,
            counts[1].misses,
            counts[1].bytes_read,
        )


def test_one_wait_a_layer_and_none_while_all_is_resident(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, real = [], SimulatedDevice.to_host

    class Watched:
        numbers = itertools.count()

        def __init__(self, copy: object) -> None:
            self.copy, self.number = copy, next(self.numbers)
            events.append(("sent", self.number))

        def wait(self) -> tuple[torch.Tensor, ...]:
            events.append(("waited", self.number))
            return self.copy.wait()

    monkeypatch.setattr(SimulatedDevice, "to_host", lambda *arguments: Watched(real(*arguments)))
    for memory, policy in (("25%", "lru"), ("25%", "lookahead"), ("100%", "lru")):
        model = foregate.load(demo_store, memory=memory, policy=policy, device="simulated", threads=1, exact=True)
        logits(model)
        if memory == "100%":
            with torch.inference_mode():
                model(torch.arange(256)[None])  # every expert of every layer, or nearly
        events.clear()
        logits(model, tokens=8)
        waits = [event for event in events if event[0] == "waited"]
        assert len(waits) == len(set(waits)) <= len(events) - len(waits), "a copy is waited for once"
        layers = len(model.foregate.store.layers)
        complete = [n for n in range(layers) if model.foregate.scheduler.is_complete(n)]
        if memory == "100%":
            assert len(complete) > layers // 2
            late = [at - events.index(("sent", n)) for at, (kind, n) in enumerate(events) if kind == "waited" and at]
            assert sum(lag > 1 for lag in late) > len(late) // 2, "nobody waits for what was just sent"
        model.foregate.close()


@pytest.mark.parametrize("memory", ["25%", "100%"])
def test_gates_say_what_they_say_on_the_cpu(memory: str, demo_store: Path) -> None:
    """After a prompt longer than what they are sent of one; with all resident the scheduler hears of calls later."""
    found, expected = (predicted_calls(demo_store, device, memory) for device in ("simulated", "cpu"))
    assert [(call.layer, call.experts) for call in found] == [(call.layer, call.experts) for call in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.before is None) == (other.before is None) == (one.layer > 0)
        for said, wanted in ((one.before, other.before), (one.after, other.after)):
            if wanted is None:
                continue
            assert [target for target, _ in said.ahead] == [target for target, _ in wanted.ahead]
            for (_, probability), (_, other_probability) in zip(said.ahead, wanted.ahead, strict=True):
                np.testing.assert_allclose(probability, other_probability, atol=1e-3)
            if wanted.reuse is not None:
                np.testing.assert_allclose(said.reuse, wanted.reuse, atol=1e-3)


def predicted_calls(store: Path, device: str, memory: str, tokens: int = 5) -> list[Call]:
    """Calls of single tokens after a prompt that chose all experts, or nearly, while the policy listens to the gates."""
    model = foregate.load(store, device=device, memory=memory, policy="lookahead", threads=1, exact=True)
    with closing(model.foregate) as engine, torch.inference_mode():
        model(torch.arange(256)[None])
        engine.settle()
        calls = engine.record_calls()
        for token in range(tokens):
            model(IDS[:1, token : token + 1])
        engine.settle()
        assert engine.listens
        return list(calls)


def test_no_expert_is_evicted_while_the_scheduler_is_told_of_it(
    demo_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of calls that were computed unasked: the end of a load may evict from the link's thread at any time."""
    model, threads = foregate.load(demo_store, device="simulated", memory="100%", policy="lru", threads=1), []
    with closing(model.foregate) as engine, torch.inference_mode():
        model(torch.arange(256)[None])
        model(TOKEN)
        model(TOKEN)
        real, before = engine._resident, engine.recorder.totals()

        def evict(key: ExpertKey) -> None:
            with engine._state:
                if engine.scheduler.is_resident(key) and engine.scheduler.evictable(key):
                    engine.scheduler._evict(key)

        def resident(layer: int, experts: Iterable[int]) -> list[int]:
            found = real(layer, experts)
            threads.append(threading.Thread(target=evict, args=[(layer, found[0])]))
            threads[-1].start()
            threads[-1].join(0.02)
            return found

        monkeypatch.setattr(engine, "_resident", resident)
        engine.settle()
        for thread in threads:
            thread.join()
        after = engine.recorder.totals()
    assert threads, "the scheduler hears of calls later"
    assert after.hits > before.hits
    assert (after.misses, after.bytes_read) == (before.misses, before.bytes_read)


def test_after_an_error_in_a_call_computed_unasked_the_model_goes_on(
    demo_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even before a layer runs: the scheduler is told of the token before when the next one is embedded."""
    model = foregate.load(demo_store, device="simulated", memory="100%", policy="lookahead", threads=1, exact=True)

    def fail(*arguments: object) -> None:
        raise RuntimeError("a policy's mistake")

    with closing(model.foregate) as engine, torch.inference_mode():
        model(torch.arange(256)[None])
        expected = model(TOKEN).logits
        monkeypatch.setattr(engine.scheduler, "routed", fail)
        with pytest.raises(RuntimeError, match="a policy's mistake"):
            model(TOKEN)
        assert torch.equal(model(TOKEN).logits, expected)


def test_three_tiers_with_the_least_host_memory(demo_store: Path) -> None:
    """Held for the host's computing, records must not keep loads waiting for ever."""
    record = foregate.load(demo_store, threads=1).foregate.store.record_bytes
    expected, _ = run(demo_store, exact=True)
    for host_memory, options in (
        (2 * record, {"exact": True}),
        (2 * record, {"link_latency": SLOW}),
        (30 * record, {"link_latency": SLOW}),
    ):
        found, model = run(demo_store, device="simulated", memory="25%", host_memory=host_memory, **options)
        assert model.foregate.device_facts["records_in_host_memory"] == host_memory // record
        assert error(found, expected) < (1e-6 if "exact" in options else 0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_smallest_budget(policy: str, demo_store: Path) -> None:
    options = {"device": "simulated", "memory": "3%", "policy": policy}
    exact, model = run(demo_store, 2, exact=True, **options)
    assert model.foregate.budget.slots == 2
    placed, _ = run(demo_store, 2, link_latency=SLOW / 4, **options)
    assert error(placed, exact) < 0.02


@pytest.mark.parametrize("fault", ["disk", "copy", "host"])
def test_after_a_fault_the_model_goes_on(fault: str, demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = {"host_memory": "1MiB"} if fault == "disk" else {"link_latency": SLOW}
    model = foregate.load(demo_store, device="simulated", memory="25%", policy="lru", threads=1, **tiers)
    expected, message = logits(model, 2), {"disk": "cannot be read", "copy": "cannot be copied", "host": "no memory"}

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error") if fault == "disk" else RuntimeError("no memory")

    monkeypatch.setattr(disk, "RETRY_PAUSES", ())
    with monkeypatch.context() as patch:
        where = {"disk": (disk.os, "preadv"), "copy": (SimulatedDevice, "copy"), "host": (HostExperts, "_compute")}
        patch.setattr(*where[fault], fail)
        with pytest.raises((ForegateError, RuntimeError), match=message[fault]):
            logits(model, 2)
    found = logits(model, 2)
    assert error(found, expected) < 0.02
    model.foregate.close()


def test_after_a_disk_that_hangs_the_model_goes_on(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"device": "simulated", "memory": "25%", "host_memory": "1MiB", "policy": "lru", "threads": 1}
    model, answer, real = foregate.load(demo_store, exact=True, **options), threading.Event(), os.preadv
    expected = logits(model, 2)

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        answer.wait(30)
        return real(fd, buffers, offset)

    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(disk.os, "preadv", hang)
    with pytest.raises(ForegateError, match="no answer"):
        logits(model, 2)
    monkeypatch.setattr(disk.os, "preadv", real)
    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 60.0)
    answer.set()
    assert torch.equal(logits(model, 2), expected)
    model.foregate.close()


def test_a_closed_model_says_so_and_ends_its_threads(demo_store: Path) -> None:
    before = threading.active_count()
    model = foregate.load(demo_store, device="simulated", memory="100%", threads=1)
    logits(model, 2)
    model.foregate.close()
    model.foregate.close()
    assert threading.active_count() == before
    with pytest.raises(ForegateError, match="was closed"):
        logits(model, 2)


def test_dropping_the_model_ends_its_threads(demo_store: Path) -> None:
    before = threading.active_count()
    model = foregate.load(demo_store, device="simulated", memory="25%", threads=1)
    assert threading.active_count() > before
    del model
    gc.collect()
    assert threading.active_count() == before


def test_what_a_device_cannot_do(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForegateError, match="unknown device gpu: choose one of cpu, cuda, simulated, auto"):
        foregate.load(demo_store, device="gpu")
    with pytest.raises(ForegateError, match="unknown kernel fast: choose one of auto, triton, cpu, reference"):
        foregate.load(demo_store, device="simulated", kernel="fast")
    with pytest.raises(ForegateError, match="--host-memory 10 is too small"):
        foregate.load(demo_store, device="simulated", host_memory=10)
    if not torch.cuda.is_available():
        with pytest.raises(ForegateError, match="cuda:0 is not here"):
            foregate.load(demo_store, device="cuda")
    before = threading.active_count()
    model = foregate.load(demo_store, device="simulated", memory="25%", threads=1)
    room = model.foregate.budget.total_bytes
    model.foregate.close()
    with monkeypatch.context() as patch:
        patch.setattr("foregate.model.loading.open_device", lambda *_: SimulatedDevice(None, 0.0, room - 1))
        with pytest.raises(
            ForegateError,
            match=r"--memory 25% takes .* are free \(.*backbone .*\): the largest that works is --memory [\d.]+%",
        ):
            foregate.load(demo_store, device="simulated", memory="25%", threads=1)
    assert threading.active_count() == before


def test_a_quantized_backbone_is_dequantized(checkpoint: Folder, tmp_path: Path) -> None:
    store = foregate.convert(checkpoint("qwen3_moe"), tmp_path / "store", bits=4, backbone_bits=8)
    expected, _ = run(store, exact=True)
    found, model = run(store, device="simulated", exact=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert "8-bit matrices dequantized" in model.foregate.device_facts["backbone"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h", "gpt_oss", "jamba"])
def test_a_backbone_in_bfloat16_has_the_dtypes_that_transformers_gives_it(family: str, checkpoint: Folder) -> None:
    from foregate.model.on_device import move

    wanted = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.bfloat16)
    moved = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    move(moved, SimulatedDevice(None, 0.0, 1 << 30), torch.bfloat16)
    dtypes = [{name: param.dtype for name, param in model.named_parameters()} for model in (wanted, moved)]
    assert dtypes[0] == dtypes[1]
    for (name, old), (_, new) in zip(wanted.named_buffers(), moved.named_buffers(), strict=True):
        assert new.dtype == old.dtype or new.dtype == torch.float32, name


def test_a_store_that_was_copied_runs_after_its_source_is_gone(stores: Folder, tmp_path: Path) -> None:
    """All records are in host memory: the disk is not needed any more."""
    copied = Path(shutil.copytree(stores("mixtral"), tmp_path / "store"))
    expected, _ = run(stores("mixtral"), exact=True)
    model = foregate.load(copied, device="simulated", memory="34%", threads=1, exact=True)
    os.truncate(model.foregate.store.experts_path, 0)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.foregate.close()
