"""The file of a model's gates, and prediction while tokens flow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foregate.errors import ForegateError
from foregate.lookahead.gate import GateLayer, token_source
from foregate.lookahead.gates import GatesHeader, LookaheadGates

LAYERS = tuple(GateLayer(f"layers.{n}", 6, 2, 16) for n in range(3))
HEADER = GatesHeader(LAYERS, 12, 2, 8, {"loss": "mse"})


@pytest.fixture
def gates() -> LookaheadGates:
    torch.manual_seed(0)
    made = [HEADER.new_gate(source) for source in range(4)]
    for gate in made:
        for parameter in gate.parameters():
            parameter.data = torch.randn(parameter.shape).half().float()
    return LookaheadGates(HEADER, made)


def test_what_is_saved_is_read_again(gates: LookaheadGates, tmp_path: Path) -> None:
    file = tmp_path / "lookahead.safetensors"
    gates.save(file)
    read = LookaheadGates.load(file, LAYERS)
    assert read.header == HEADER
    for gate, other in zip(gates.gates, read.gates, strict=True):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in gate.state_dict().items())
    assert [child.name for child in tmp_path.iterdir()] == ["lookahead.safetensors"]


def test_prediction_sees_the_latest_scores(gates: LookaheadGates) -> None:
    hidden, embedding = torch.randn(1, 16), torch.randn(1, 12)
    scores = [torch.randn(2, 7) for _ in LAYERS]  # one more than there are experts
    first = gates.predict(2, hidden)
    for layer, values in enumerate(scores):
        gates.observe(layer, values, torch.tensor([[1, 2], [0, 6]]))
    found = gates.predict(2, hidden)
    assert [target for target, _ in found] == [(0, True), (1, True)]
    recent = torch.cat([scores[0][-1:, :6], scores[1][-1:, :6]], dim=1)
    for part, wanted in zip(found, gates.gates[2].probabilities(gates.gates[2](hidden, recent)), strict=True):
        torch.testing.assert_close(part[1], wanted[0])
    assert not torch.equal(first[0][1], found[0][1])
    token = gates.predict(3, embedding)
    wanted = gates.gates[3].probabilities(gates.gates[3](token_source(embedding), recent))
    assert [target for target, _ in token] == [(0, False), (1, False)]
    torch.testing.assert_close(token[1][1], wanted[1][0])
    gates.reset()
    assert torch.equal(gates.predict(2, hidden)[0][1], first[0][1])


def test_of_several_tokens_any_may_choose_an_expert(gates: LookaheadGates) -> None:
    hidden = torch.randn(4, 16)
    alone = torch.stack([gates.predict(0, row[None])[0][1] for row in hidden])
    torch.testing.assert_close(gates.predict(0, hidden)[0][1], 1 - (1 - alone).prod(0))


def test_reuse_sees_what_was_used(gates: LookaheadGates) -> None:
    head = gates.gates[1].reuse
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.shared[:, 0] = 1.0  # the first decayed frequency
    hidden = torch.randn(1, 16)
    gates.observe(1, torch.randn(1, 6), torch.tensor([[2, 6]]))  # 6 is no expert
    probabilities = gates.reuse(1, hidden)
    assert probabilities.shape == (3, 6)
    assert (probabilities.argmax(1) == 2).all()


def test_a_file_that_is_missing_damaged_or_of_another_model(gates: LookaheadGates, tmp_path: Path) -> None:
    file = tmp_path / "lookahead.safetensors"

    def refused(match: str, layers: tuple[GateLayer, ...] = LAYERS) -> None:
        with pytest.raises(ForegateError, match=match) as caught:
            LookaheadGates.load(file, layers)
        assert "\n" not in str(caught.value)

    refused("has no lookahead gates: train them with foregate align")
    gates.save(file)
    refused("gates of another model", LAYERS[:2])
    refused("gates of another model", (*LAYERS[:2], replace(LAYERS[2], top_k=1)))
    content = file.read_bytes()
    for damaged in (b"", content[:50], content[:-10], content.replace(b'width\\": 8', b'width\\": 9'), b"{}" * 100):
        assert damaged != content
        file.write_bytes(damaged)
        refused("is damaged")
    file.write_bytes(content.replace(b'version\\": 2', b'version\\": 1'))
    refused("was written by another version of Foregate: train the gates again")
    LookaheadGates(replace(HEADER, horizon=3), gates.gates).save(file)
    refused("is damaged")


def test_older_gates_stay_when_writing_fails(gates: LookaheadGates, small_disk: Path) -> None:
    file = small_disk / "lookahead.safetensors"
    file.write_bytes(b"older")
    (small_disk / "others").write_bytes(bytes(1016 << 10))
    with pytest.raises(OSError):
        gates.save(file)
    assert file.read_bytes() == b"older"
    assert sorted(child.name for child in small_disk.iterdir()) == ["lookahead.safetensors", "others"]


def test_reuse_heads_have_an_eighth_of_the_width_in_whole_eights() -> None:
    widths = {width: replace(HEADER, width=width).reuse_width for width in (0, 8, 64, 120, 128, 256, 512)}
    assert widths == {0: 8, 8: 8, 64: 8, 120: 8, 128: 16, 256: 32, 512: 64}
    head = replace(HEADER, width=512).new_gate(0).reuse
    assert head.down.shape == (64, LAYERS[0].input_size)
