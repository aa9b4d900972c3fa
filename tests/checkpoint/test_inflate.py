"""Inflated models compute what the small ones do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import foregate
from foregate.checkpoint import growth
from foregate.checkpoint.inflate import INDEX_FILE, inflate
from foregate.checkpoint.source import open_checkpoint
from foregate.errors import ForegateError

Folder = Callable[[str], Path]
DEMO = Path(__file__).parents[2] / "demo"
DEMO_SIZES = {"mixtral-tiny": (512, 384), "qwen3-moe-tiny": (576, 128)}  # 2 x 3 and 3 x 2 copies
IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=DEMO_SIZES)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A trained model and its inflated version, which goes again: it has 128 MB."""
    hidden, ffn = DEMO_SIZES[request.param]
    wide = tmp_path_factory.mktemp("inflated") / request.param
    yield DEMO / request.param, inflate(DEMO / request.param, wide, hidden=hidden, ffn=ffn, shard_bytes=40 << 20)
    shutil.rmtree(wide)


def float_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_same_logits(small: PreTrainedModel, wide: PreTrainedModel, ids: torch.Tensor, tolerance: float) -> None:
    with torch.inference_mode():
        expected, found = small(input_ids=ids).logits, wide(input_ids=ids).logits
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", growth.FAMILIES)
def test_every_family_computes_the_same_function(family: str, tmp_path: Path) -> None:
    small = save_tiny(family, tmp_path / "small")
    config = small.config
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    wide = inflate(tmp_path / "small", tmp_path / "wide", hidden=3 * config.hidden_size, ffn=5 * inner)
    assert_same_logits(small, float_model(wide), IDS, 1e-5)


def test_trained_models_write_the_same_text(demo: tuple[Path, Path]) -> None:
    small, wide = (float_model(path) for path in demo)
    ids = AutoTokenizer.from_pretrained(demo[1])("And the LORD said unto Moses,", return_tensors="pt").input_ids
    assert_same_logits(small, wide, ids, 1e-5)
    texts = [model.generate(ids, max_new_tokens=64, do_sample=False) for model in (small, wide)]
    assert texts[0].shape[1] > 60
    assert torch.equal(*texts)


def test_quantized_models_stay_the_same_function_too(demo: tuple[Path, Path], tmp_path: Path) -> None:
    models = []
    for name, path in zip(("small", "wide"), demo, strict=True):
        store = foregate.convert(path, tmp_path / name, bits=4, backbone_bits=4)
        models.append(foregate.load(store, memory="100%", exact=True))
    assert_same_logits(*models, IDS, 1e-4)
    for model in models:
        model.foregate.close()


def test_no_weight_is_rounded(demo: tuple[Path, Path]) -> None:
    """Copies, or shares that add up to the trained weight, in bfloat16."""
    small, wide = (open_checkpoint(path) for path in demo)
    hidden = small.config.hidden_size
    kinds = {name.split(".")[-2]: name for name in small.tensors}
    assert kinds.keys() >= {"embed_tokens", "q_proj", "o_proj", "input_layernorm", "norm", "gate"}
    for kind, name in kinds.items():
        before, after = small.tensors[name].read(), wide.tensors[name].read()
        assert after.dtype == torch.bfloat16
        if "norm" in kind and len(before) == hidden:
            assert torch.equal(after.float().view(-1, hidden).sum(0), before.float()), name
        elif kind in ("w2", "down_proj"):
            parts = after[:hidden].float().unflatten(1, (-1, before.shape[1]))
            assert torch.equal(parts.sum(1), before.float()), name
        else:
            copies = [after_size // size for after_size, size in zip(after.shape, before.shape, strict=True)]
            assert torch.equal(after, before.repeat(copies)), name


def test_the_folder_is_a_whole_checkpoint(demo: tuple[Path, Path]) -> None:
    names = {file.name for file in demo[1].iterdir()}
    index = json.loads((demo[1] / INDEX_FILE).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {*copied, "lookahead.safetensors", INDEX_FILE, *files}
    assert all((demo[1] / name).read_bytes() == (demo[0] / name).read_bytes() for name in copied - {"config.json"})
    tensors = [tensor for name in files for tensor in load_file(demo[1] / name).values()]
    assert sum(tensor.nbytes for tensor in tensors) == index["metadata"]["total_size"]
    assert max((demo[1] / name).stat().st_size for name in files) < 41 << 20


def test_the_sizes_of_the_source_change_nothing(checkpoint: Folder, tmp_path: Path) -> None:
    source = checkpoint("mixtral")
    same = open_checkpoint(inflate(source, tmp_path / "same", hidden=64, ffn=96)).tensors
    before = open_checkpoint(source).tensors
    assert same.keys() == before.keys()
    assert all(torch.equal(same[name].read(), entry.read()) for name, entry in before.items())


def test_what_cannot_be_inflated(checkpoint: Folder, store: Folder, tmp_path: Path, small_disk: Path) -> None:
    wide = tmp_path / "wide"

    def refused(match: str, source: Path, destination: Path = wide, hidden: int = 128, ffn: int = 96) -> None:
        with pytest.raises(ForegateError, match=match) as caught:
            inflate(source, destination, hidden=hidden, ffn=ffn)
        assert "\n" not in str(caught.value)
        assert not destination.exists()
        assert not destination.with_name(destination.name + ".partial").exists()

    mixtral = checkpoint("mixtral")
    refused(
        "--hidden 100 is not a multiple of the model's hidden_size 64: the nearest is 64 or 128", mixtral, hidden=100
    )
    refused("--hidden 32 is not a multiple .* the nearest is 64$", mixtral, hidden=32)
    refused("--ffn 200 is not a multiple of the model's intermediate_size 96: .* 192 or 288", mixtral, ffn=200)
    refused("--ffn 49 .* moe_intermediate_size 48: .* 48 or 96", checkpoint("qwen3_moe"), ffn=49)
    refused("model_type gpt_oss cannot be inflated, for only .*mixtral, .* are known", checkpoint("gpt_oss"))
    refused("is a Foregate store already: .* name the original checkpoint", store("mixtral"))
    refused("MiB free and the inflated checkpoint needs .* free space", mixtral, small_disk / "wide")
    (wide / "something").mkdir(parents=True)
    with pytest.raises(ForegateError, match="exists already"):
        inflate(mixtral, wide, hidden=128, ffn=96)


def test_a_norm_that_spans_all_heads_is_refused(
    checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "FAMILIES", ("olmoe",))
    with pytest.raises(ForegateError, match="k_norm.weight cannot be inflated: its shape .* is not in units of 64"):
        inflate(checkpoint("olmoe"), tmp_path / "wide", hidden=128, ffn=96)


def test_an_interrupted_run_leaves_nothing_that_matters(checkpoint: Folder, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise KeyboardInterrupt

    source, wide = checkpoint("mixtral"), tmp_path / "wide"
    with pytest.raises(KeyboardInterrupt):
        inflate(source, wide, hidden=128, ffn=96, progress=stop)
    assert list(tmp_path.iterdir()) == []
    partial = tmp_path / "wide.partial"  # what a killed run leaves
    partial.mkdir()
    (partial / "model-00007-of-00009.safetensors").write_bytes(bytes(100))
    inflate(source, wide, hidden=128, ffn=96)
    assert not partial.exists()
    assert "model-00007-of-00009.safetensors" not in {file.name for file in wide.iterdir()}


@pytest.mark.slow
def test_a_large_checkpoint_in_bounded_memory(tmp_path: Path) -> None:
    """2 GB of weights beside the libraries' own 0.5 GiB."""
    arguments = ["inflate", DEMO / "mixtral-tiny", tmp_path / "wide", "--hidden", "1024", "--ffn", "3328"]
    code = "import resource, sys; from foregate.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert sum(file.stat().st_size for file in (tmp_path / "wide").iterdir()) > 1.9e9
    assert int(done.stdout.split()[-1]) < 1 << 30
