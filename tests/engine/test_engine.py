"""The engine: the same bytes out whatever the budget and policy, and it survives errors."""

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import foregate
from foregate.checkpoint.store import RecordLayout
from foregate.engine import base as engine_module
from foregate.engine.base import places_by_expert
from foregate.engine.host import weighted_sum
from foregate.errors import ForegateError
from foregate.memory import disk
from foregate.schedule import BOUNDS, POLICIES

Folder = Callable[[str], Path]
IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(3))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_output_is_byte_identical_for_every_budget_and_policy(family: str, store: Folder) -> None:
    results = []
    for memory in ("17%", "34%", "100%"):
        for policy in ("demand", "lru", "mixtral-offloading", "mixtral-offloading-code"):
            if family == "qwen3_moe" and memory == "17%":
                memory = "20%"
            model = foregate.load(store(family), memory=memory, policy=policy)
            results.append((logits(model, IDS), model.generate(IDS[:1], max_new_tokens=12, do_sample=False)))
            model.foregate.close()
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_a_tokens_result_does_not_depend_on_its_batch(family: str, store: Folder) -> None:
    """The experts of one layer on 29 tokens at once, in other company, and one by one: the same bits."""
    model = foregate.load(store(family), memory="100%")
    experts = model.get_submodule(model.foregate.store.layers[0].module)
    top_k, count = model.foregate.store.layers[0].top_k, model.foregate.store.layers[0].num_experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(29, 64, generator=generator)
    index = torch.rand(29, count, generator=generator).topk(top_k).indices
    weights = torch.rand(29, top_k, generator=generator)
    with torch.inference_mode():
        together = experts(hidden, index, weights)
        alone = torch.cat([experts(hidden[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(29)])
        shuffled = torch.randperm(29, generator=generator)
        other = experts(hidden[shuffled], index[shuffled], weights[shuffled])
    assert torch.equal(together, alone)
    assert torch.equal(together[shuffled], other)
    model.foregate.close()


@pytest.mark.parametrize("policy", ["lru", "lookahead", "mixtral-offloading"])
def test_a_call_may_ask_for_gradients(demo_store: Path, policy: str) -> None:
    """As in a notebook, without `torch.no_grad`: a prompt, then a token."""
    model = foregate.load(demo_store, memory="25%", policy=policy, threads=1)
    for ids in (torch.tensor([[5, 9, 77, 12]]), torch.tensor([[3]])):
        logits = model(ids).logits
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
    model.foregate.close()


def test_every_policy_writes_the_same_text_on_a_trained_model(demo_store: Path) -> None:
    """The bounds know the future from a run that was recorded."""
    prompt, texts, future = torch.arange(50, 62)[None], {}, None
    for policy in [*POLICIES, *BOUNDS]:
        model = foregate.load(demo_store, memory="25%", policy=policy, threads=1, future=future)
        calls = model.foregate.record_calls()
        texts[policy] = model.generate(prompt, max_new_tokens=24, do_sample=False)
        future = future or [(call.layer, call.experts) for call in calls]
        model.foregate.close()
    assert all(torch.equal(text, texts["lru"]) for text in texts.values())


def test_hits_misses_and_bytes_are_what_the_policy_makes_them(store: Folder) -> None:
    model = foregate.load(store("mixtral"), memory="100%", policy="lru")
    engine = model.foregate
    logits(model, IDS)
    first = engine.recorder.totals()
    assert first.hits == 0
    assert first.bytes_read == first.misses * engine.store.record_bytes
    engine.recorder.reset()
    logits(model, IDS)
    second = engine.recorder.totals()
    assert (second.hits, second.misses, second.bytes_read) == (first.misses, 0, 0)
    engine.close()


def test_each_needed_expert_is_read_once_per_layer_and_prompt(store: Folder) -> None:
    model = foregate.load(store("olmoe"), memory="9%", policy="lru")  # 2 slots, and the prompt needs all 8 of a layer
    logits(model, IDS)
    totals = model.foregate.recorder.totals()
    assert totals.misses >= 20
    assert totals.hits == 0
    assert totals.bytes_read == totals.misses * model.foregate.store.record_bytes
    model.foregate.close()


def test_after_a_read_error_the_model_goes_on(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of the disk that cannot be read, however often it is tried."""
    model = foregate.load(store("mixtral"), memory="50%")
    expected, real, bad = logits(model, IDS), os.preadv, []

    def fail_at_one_place(fd: int, buffers: list[memoryview], offset: int) -> int:
        bad.append(offset)
        if offset == bad[len(bad[:3]) - 1]:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk, "RETRY_PAUSES", (0.001, 0.001, 0.001))
    monkeypatch.setattr(disk.os, "preadv", fail_at_one_place)
    with pytest.raises(ForegateError, match=r"record model\.layers.* cannot be read"):
        logits(model, IDS)
    monkeypatch.setattr(disk.os, "preadv", real)
    assert torch.equal(logits(model, IDS), expected)
    model.foregate.close()


@pytest.mark.parametrize("fault", ["one error", "short reads", "slow reads"])
@pytest.mark.parametrize("policy", ["lru", "mixtral-offloading", "lookahead"])
def test_a_poor_disk_never_changes_the_text(
    demo_store: Path, policy: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, texts = torch.arange(50, 62)[None], []
    model = foregate.load(demo_store, memory="25%", policy="lru", threads=1)
    texts.append(model.generate(prompt, max_new_tokens=12, do_sample=False))
    model.foregate.close()
    real, calls = os.preadv, itertools.count(1)

    def poor(fd: int, buffers: list[memoryview], offset: int) -> int:
        number = next(calls)
        if fault == "one error" and number % 10 == 0:
            raise OSError(errno.EIO, "Input/output error")
        if fault == "short reads" and len(buffers[0]) > 4096:
            return real(fd, [buffers[0][:4096]], offset)
        if fault == "slow reads" and number in (5, 60):
            time.sleep(1.0)
        return real(fd, buffers, offset)

    model = foregate.load(demo_store, memory="25%", policy=policy, threads=1)
    monkeypatch.setattr(disk.os, "preadv", poor)
    texts.append(model.generate(prompt, max_new_tokens=12, do_sample=False))
    model.foregate.close()
    assert torch.equal(*texts)
    assert next(calls) > 60


def test_a_record_that_changes_while_it_is_in_use_is_an_error(store: Folder, tmp_path: Path) -> None:
    """Bytes of one record change on disk after loading: the text stays right, or the run ends with the record's name."""
    copied = Path(shutil.copytree(store("mixtral"), tmp_path / "store"))
    model = foregate.load(copied, memory="25%", policy="lru")
    expected = logits(model, IDS)
    file = model.foregate.store.experts_path
    offset, _ = model.foregate.store.location((0, 0))
    time.sleep(0.02)  # file systems stamp changes with a coarse clock
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ForegateError, match=r"record model\.layers\.0\.mlp\.experts\.0 is damaged"):
        logits(model, IDS)
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(byte)
    assert torch.equal(logits(model, IDS), expected)
    model.foregate.close()


def test_after_a_disk_that_hangs_the_model_goes_on(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = foregate.load(store("mixtral"), memory="25%", policy="lru")
    expected, real, answer = logits(model, IDS), os.preadv, threading.Event()

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        answer.wait(30)
        return real(fd, buffers, offset)

    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(disk.os, "preadv", hang)
    with pytest.raises(ForegateError, match="no answer from the disk"):
        logits(model, IDS)
    monkeypatch.setattr(disk.os, "preadv", real)
    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 60.0)
    answer.set()
    assert torch.equal(logits(model, IDS), expected)
    model.foregate.close()


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("listener", ["scheduler", "recorder"])
def test_an_error_on_the_links_thread_is_raised_by_the_next_layer(
    store: Folder, device: str, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy of one's own may be wrong: that is said at once, and the model goes on."""
    model = foregate.load(store("mixtral"), memory="25%", device=device, policy="lru", exact=True)
    engine, expected = model.foregate, logits(model, IDS)

    def fail(*arguments: object) -> None:
        raise ValueError("a policy's mistake")

    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 5.0)
    with monkeypatch.context() as patch:
        told = {"scheduler": (engine.scheduler, "arrived"), "recorder": (engine.recorder, "loaded")}
        patch.setattr(*told[listener], fail)
        with pytest.raises(ValueError, match="a policy's mistake"):
            logits(model, IDS)
    assert torch.equal(logits(model, IDS), expected)
    engine.close()


def test_predictions_wait_for_a_lost_link_to_be_opened_again(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampled token's prediction comes before any layer runs: it must not go to the link that was given up."""
    model = foregate.load(demo_store, memory="25%", policy="lookahead", threads=1)
    token, real, answer = torch.tensor([[77]]), os.preadv, threading.Event()
    expected = logits(model, token)

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        answer.wait(30)
        return real(fd, buffers, offset)

    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(disk.os, "preadv", hang)
    with pytest.raises(ForegateError, match="no answer from the disk"):
        logits(model, IDS)
    monkeypatch.setattr(disk.os, "preadv", real)
    monkeypatch.setattr(engine_module, "WAIT_SECONDS", 60.0)
    answer.set()
    assert torch.equal(logits(model, token), expected)
    model.foregate.close()


def test_a_closed_model_says_so(store: Folder) -> None:
    model = foregate.load(store("mixtral"), memory="50%")
    model.foregate.close()
    with pytest.raises(ForegateError, match="was closed"):
        logits(model, IDS)


def test_two_threads_may_use_one_model(store: Folder) -> None:
    model = foregate.load(store("mixtral"), memory="25%")
    expected, results = logits(model, IDS), []
    threads = [threading.Thread(target=lambda: results.append(logits(model, IDS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)
    model.foregate.close()


def test_dropping_the_model_ends_its_threads(store: Folder) -> None:
    before = threading.active_count()
    model = foregate.load(store("mixtral"))
    assert threading.active_count() > before
    del model
    import gc

    gc.collect()
    assert threading.active_count() == before


def test_a_failed_load_leaves_no_threads(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr("foregate.model.loading._build_backbone", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        foregate.load(store("mixtral"))
    assert threading.active_count() == before


def test_a_slot_is_prepared_once_for_all_layers_alike(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = foregate.load(store("mixtral"), memory="34%", policy="lru")
    unpacked, unpack = [], RecordLayout.unpack
    monkeypatch.setattr(RecordLayout, "unpack", lambda layout, record: unpacked.append(1) or unpack(layout, record))
    logits(model, IDS)
    assert model.foregate.recorder.totals().misses > model.foregate.budget.slots >= len(unpacked) > 0
    model.foregate.close()


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10_000))
def test_places_by_expert_against_a_loop(tokens: int, top_k: int, seed: int) -> None:
    index = torch.randint(-1, 7, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    places = places_by_expert(index, num_experts=6)
    flat = index.flatten().tolist()
    expected = {e: [n for n, chosen in enumerate(flat) if chosen == e] for e in sorted(set(flat)) if 0 <= e < 6}
    assert {expert: place.rows.tolist() for expert, place in places.items()} == expected
    assert all(place.tokens.tolist() == [row // top_k for row in place.rows.tolist()] for place in places.values())
    assert list(places) == list(expected)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10_000))
def test_weighted_sum_against_einsum(tokens: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, weights = (
        torch.randn(tokens, top_k, 5, generator=generator),
        torch.rand(tokens, top_k, generator=generator),
    )
    expected = torch.einsum("tkh,tk->th", outputs, weights)
    torch.testing.assert_close(weighted_sum(outputs, weights), expected)
