"""Which configurations the Triton kernels use: the table, what was tuned on the card, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from experts import Experts, random_slots

from foregate.errors import ForegateError
from foregate.kernels.cpu import Activation
from foregate.kernels.slots import Rows, SlotReference

triton_kernels = pytest.importorskip("foregate.kernels.triton", reason="Triton is not installed")

from triton.runtime.errors import OutOfResources  # noqa: E402 - only where Triton is

from foregate.kernels.triton import configs, decode, grouped, tune  # noqa: E402
from foregate.kernels.triton.configs import DECODE, DECODE_ANY, Decode, Grouped  # noqa: E402
from foregate.kernels.triton.record import MatrixPlace, record_places  # noqa: E402

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(triton_kernels.why_not(CPU) is not None, reason="only under the interpreter")
SLOTS = torch.tensor([[0, 1]], dtype=torch.int32)
ROWS = Rows(SLOTS.view(-1), torch.zeros(2, dtype=torch.int32), torch.arange(2, dtype=torch.int32))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "foregate"


def make_kernel():
    activation = Activation("relu2", "ungated")
    layout, slots = random_slots(activation, 4, hidden=64, inner=48)
    return triton_kernels.TritonKernel(Experts(activation), layout, slots, activation, record_places(layout))


def matrix(rows: int, cols: int) -> MatrixPlace:
    activation = Activation("relu2", "ungated")
    layout, _ = random_slots(activation, 4, hidden=cols, inner=rows, experts=1)
    return record_places(layout).up


def test_the_table_has_every_width_and_its_kernels_fill_a_thread() -> None:
    for table in DECODE.values():
        assert set(table) == {2, 3, 4, 8}
        for bits, config in table.items():
            words = {8: 16, 4: 8, 3: 4, 2: 4}[bits]
            assert config.rows * config.wide * words >= 2 * 32 * config.warps  # 8 bytes of every thread


def test_tuned_before_table_before_any(cache_folder: Path) -> None:
    known, unknown = matrix(1536, 2048), matrix(100, 100)
    assert list(configs.candidates(Decode, known, CPU)) == [DECODE[1536, 2048][4], *DECODE_ANY]
    assert list(configs.candidates(Decode, unknown, CPU)) == list(DECODE_ANY)
    best = Decode(32, 2, 8, 3, True)
    file = configs.write_tuned("interpreter", {configs.key(Decode, known): best})
    assert file.parent == cache_folder
    configs.write_tuned("interpreter", {configs.key(Grouped, known): Grouped(16, 16, 8, 2)})
    assert next(configs.candidates(Decode, known, CPU)) == best
    assert next(configs.candidates(Grouped, known, CPU)) == Grouped(16, 16, 8, 2)
    assert list(configs.candidates(Decode, unknown, CPU)) == list(DECODE_ANY)
    assert [path.name for path in cache_folder.iterdir()] == ["triton-interpreter.json"]


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "configs": {"decode x": {"a": 1}}}']
)
def test_a_damaged_or_old_file_of_tuned_configurations_is_ignored(damage: str) -> None:
    file = configs.write_tuned("some card", {})
    assert json.loads(file.read_text())["card"] == "some card"
    file.write_text(damage)
    assert configs.read_tuned("some card") == {}


class Refusing:
    """A kernel on a card that grants few threads."""

    def __init__(self, kernel, most_warps: int) -> None:
        self.kernel, self.most_warps = kernel, most_warps

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            if constants["num_warps"] > self.most_warps:
                raise OutOfResources(constants["num_warps"], self.most_warps, "warps")
            self.kernel[grid](*arguments, **constants)

        return launch


def refuse(monkeypatch: pytest.MonkeyPatch, most_warps: int) -> None:
    for module, name in (
        (decode, "decode_up"),
        (decode, "decode_down"),
        (decode, "decode_down_sum"),
        (grouped, "grouped_down"),
    ):
        monkeypatch.setattr(module, name, Refusing(getattr(module, name), most_warps))


def test_what_the_card_refuses_is_replaced_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, most_warps=1)
    kernel = make_kernel()
    kernel.prepare(torch.float32, top_k=2)
    assert kernel.chosen(Decode) == (DECODE_ANY[1], DECODE_ANY[1])
    assert kernel.chosen(Grouped) is None  # all its configurations have more warps
    assert "grouped on PyTorch, slow: interpreter refuses every configuration: out of resource: warps" in kernel.note
    hidden, reference = torch.randn(1, 64), SlotReference(kernel.experts, kernel.layout, kernel.slots)
    for way in (False, True):
        found, expected = torch.zeros(2, 64), torch.zeros(2, 64)
        kernel.run(hidden, ROWS, found, way)
        reference.run(hidden, ROWS, expected, way)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, expected) == way  # the reference itself


def test_a_card_that_refuses_everything_computes_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, most_warps=0)
    kernel = make_kernel()
    kernel.prepare(torch.float32, top_k=2)
    assert kernel.note.count("PyTorch, slow") == 2
    reference = SlotReference(kernel.experts, kernel.layout, kernel.slots)
    hidden, weights, found, expected = torch.randn(1, 64), torch.rand(1, 2), torch.zeros(1, 64), torch.zeros(1, 64)
    kernel.decode(hidden, SLOTS, weights, found)
    reference.decode(hidden, SLOTS, weights, expected)
    assert torch.equal(found, expected)
    with pytest.raises(ForegateError, match="nothing to tune"):
        tune.tune(kernel, hidden, [SLOTS], lambda call: 1.0, grouped=False)


def test_tuning_finds_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that refuses 8 warps, where more warps are faster, and experts apart slower."""
    refuse(monkeypatch, most_warps=4)
    space = [Decode(32, 1, warps, 1, apart) for warps in (2, 4, 8, 1) for apart in (True, False)]
    monkeypatch.setattr(tune, "decode_space", lambda matrix, apart=False: space)
    kernel = make_kernel()

    def measure(call) -> float:
        up, down = kernel.chosen(Decode)
        return 100 - up.warps - down.warps + up.apart + down.apart

    tuned = tune.tune(kernel, torch.randn(1, 64), [SLOTS], measure, grouped=False)
    assert tuned == dict.fromkeys(("decode 48x64 4 bits", "decode 64x48 4 bits"), Decode(32, 1, 4))
    assert kernel.chosen(Decode) == tuple(tuned.values())


def test_spaces_are_small_enough_to_compile() -> None:
    place = record_places(random_slots(Activation(), 2, 64, 64)[0]).down
    space = list(tune.decode_space(place, apart=True))
    assert len(space) == len(set(space)) < 150
    assert {config.apart for config in space} == {False, True}
    assert len(set(tune.grouped_space())) == len(list(tune.grouped_space())) < 100
