"""Live benches on the demo model, short: they measure what they say and notice what spoils a comparison."""

from pathlib import Path

import pytest

from foregate.bench import live
from foregate.bench.live import Place, Script
from foregate.bench.paper import ALIGNED, CODE, PAPER, SPECULATIVE, UNTRAINED, bench_paper
from foregate.bench.policies import Bench, bench_policies
from foregate.bench.validate import validate
from foregate.errors import ForegateError

SCRIPT = Script(("And the LORD",), tokens=6, warm_up=1)


@pytest.fixture(scope="module")
def bench(demo_store: Path) -> Bench:
    return Bench(demo_store, SCRIPT, place=Place(threads=1), allow_buffered=True)


def test_policies(bench: Bench) -> None:
    (cell,) = bench_policies(bench, ["lru", "lookahead", "clairvoyant"], ["25%"], [50e6], repeats=2)
    assert [row["name"] for row in cell] == ["lru", "lookahead", "clairvoyant"]
    layers, top_k = 12, 2
    for row in cell:
        assert len(row["runs"]) == 2
        for run in row["runs"]:
            assert run["tokens"] == SCRIPT.tokens
            assert run["hits"] + run["misses"] == SCRIPT.tokens * layers * top_k
            assert run["stall_seconds"] + run["kernel_seconds"] < run["seconds"]
            assert run["link_seconds"] <= run["seconds"] + 0.01
    lru, _, bound = cell
    assert lru["prefetch_precision"] is None
    assert bound["bytes_per_token"] < lru["bytes_per_token"]


def test_the_papers_ladder(bench: Bench) -> None:
    (cell,) = bench_paper([bench], ["25%"], [None], repeats=1)
    assert [row["name"] for row in cell] == [CODE, PAPER, UNTRAINED, ALIGNED, SPECULATIVE]
    assert {row["bits"] for row in cell} == {4}
    assert cell[0]["published_gain"] == 0.5772
    assert cell[1]["ratios"][PAPER] == 1
    code, paper = cell[:2]
    assert code["bytes_per_token"] > paper["bytes_per_token"] / 2
    with pytest.raises(ForegateError, match="4, 4 bits: each width may come once"):
        next(bench_paper([bench, bench], ["25%"], [None], repeats=1))


def test_the_simulator_repeats_the_engine(bench: Bench) -> None:
    """On a paced link with loads of milliseconds, so that what a busy machine adds to them counts for little."""
    for row in validate(bench, ["lru", "clairvoyant-patient"], ["25%"], [4e6]):
        assert row.simulated.tokens == row.live.counts.tokens
        assert row.simulated.hits + row.simulated.misses == row.live.counts.hits + row.live.counts.misses
        assert row.ratio == pytest.approx(1, abs=0.35)
        if row.setting.policy == "lru":  # nothing there depends on time
            assert row.simulated.misses == row.live.counts.misses


def test_reads_through_the_page_cache_are_no_benchmark(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.Engine, "direct_reads", False)
    strict = Bench(bench.store, SCRIPT, place=Place(threads=1))
    with pytest.raises(ForegateError, match="through the page cache.*--allow-buffered"):
        strict.record("25%")


def test_policies_on_a_device(demo_store: Path) -> None:
    bench = Bench(demo_store, SCRIPT, Place("simulated", threads=1))
    (cell,) = bench_policies(bench, ["lru", "lookahead", "lookahead+host"], ["25%"], [8e6], repeats=1)
    lru, lookahead, placed = cell
    assert placed["bytes_per_token"] < lookahead["bytes_per_token"] < 2 * lru["bytes_per_token"]
    assert all(run["prompt_seconds"] > 0 for row in cell for run in row["runs"])
    with pytest.raises(ForegateError, match="add --device cuda"):
        next(bench_policies(Bench(demo_store, SCRIPT), ["lookahead+host"], ["25%"], [None], repeats=1))
