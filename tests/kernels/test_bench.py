"""The kernel benchmark on a tiny shape: it measures every kind of row, and its table fits a terminal."""

import sys

import pytest

from foregate.cli.main import main
from foregate.errors import ForegateError
from foregate.kernels import bench, cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (192, 128)})
    monkeypatch.setattr(bench, "TURNS_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)


def test_every_row_is_timed() -> None:
    bandwidth, timings = bench.bench_kernels("tiny", [4, 2], [1, 3], repeats=2)
    assert bandwidth > 0
    rows = {(timing.name, timing.tokens): timing for timing in timings}
    assert len(rows) == len(timings) == (2 * 4 + 2) * 2
    for timing in timings:
        assert 0 < timing.fastest <= timing.median <= timing.slowest
    block_bytes = 64 // 2 + 2  # 4 bits, a scale and a zero point
    assert rows["4-bit int8", 1].nbytes == 192 * 2 * block_bytes + 4
    assert rows["expert, 4-bit int8", 3].nbytes == 3 * 192 * 2 * block_bytes + 8


def test_records_that_take_turns_do_not_share_memory() -> None:
    records = bench._in_slots({"matrix": bench._random_matrix(4, 192, 128)})
    places = [record["matrix"].planes["low"].data_ptr() for record in records]
    assert len(set(places)) == len(places) >= 2


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ForegateError, match="choose one of tiny"):
        bench.bench_kernels("huge", [4], [1])


def test_the_table_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["foregate", "bench", "kernels", "--shape", "tiny", "--tokens", "16"])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code in (0, None)
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if "-bit" in line or "torch" in line]
    assert len(rows) == 4 * 4 + 2
    assert all(row[-1].endswith("%") for row in rows)
