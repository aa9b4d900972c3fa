"""Every family: what runs from the store is what transformers runs from the checkpoint."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.aria import modeling_aria

import foregate
from foregate.checkpoint.architecture import auto_class
from foregate.checkpoint.store import EXPERTS_FILE, Store
from foregate.errors import ForegateError

Folder = Callable[[str], Path]

# Aria came behind the experts interface after transformers 5.17.
ARIA = () if hasattr(modeling_aria, "use_experts_implementation") else ("aria", "aria_text")
# transformers asks for SciPy to build the vision tower of Inkling.
INKLING = () if importlib.util.find_spec("scipy") else ("inkling_mm_model",)
PRESENT = [family for family in FAMILIES if family in CONFIG_MAPPING and family not in (*ARIA, *INKLING)]
# All combinations of memory and policy for families that differ in kind; the two ends for the rest.
MAIN = {
    "mixtral",  # per-expert checkpoint
    "qwen3_moe",
    "qwen3_5_moe",  # sees too: only the text part is run
    "deepseek_v3",  # dense first layer, grouped routing, shared expert
    "deepseek_v4",  # hash routing
    "gpt_oss",  # transposed, biases, gate and up interleaved
    "granitemoe",  # fused checkpoint
    "gemma4",  # dense and routed part side by side
    "nemotron_h",  # no gate
    "jamba",  # recurrent layers
    "muse_spark",  # norm after each expert
    "zaya",  # one expert per token
}
ENDS = [("smallest", "lru"), ("100%", "lru")]
SETTINGS = [(memory, policy) for memory in ("smallest", "50%", "100%") for policy in ("lru", "demand")]
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def test_enough_families_are_tested() -> None:
    assert len(PRESENT) >= 50


@pytest.mark.parametrize("family", PRESENT)
def test_same_logits_and_greedy_tokens_as_transformers(family: str, checkpoint: Folder, store: Folder) -> None:
    reference = auto_class(tiny_config(family)).from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    with torch.inference_mode():
        logits, tokens = reference(input_ids=IDS).logits, reference.generate(IDS[:1], **GREEDY)
    for memory, policy in SETTINGS if family in MAIN else ENDS:
        model = foregate.load(store(family), memory=smallest_budget(store(family), memory), policy=policy)
        with torch.inference_mode():
            torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
            assert torch.equal(model.generate(IDS[:1], **GREEDY), tokens)
        model.foregate.scheduler.check_integrity()
        model.foregate.close()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", "LlamaForCausalLM .* is not a Mixture-of-Experts model"),
        ("llama4_text", "Llama4ForCausalLM .* experts class Llama4TextExperts does not go through"),
        ("jetmoe", "JetMoeForCausalLM .* experts class JetMoeParallelExperts does not go through"),
        ("dbrx", "DbrxForCausalLM .* experts class DbrxExperts does not go through"),
        ("longcat_flash", "LongcatFlashForCausalLM .* experts class LongcatFlashExperts does not go through"),
        ("step3p7", "Step3p7ForConditionalGeneration .* experts class Step3p7Experts does not go through"),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration .* Ernie4_5_VLMoeMoeExperts mixes experts"),
        ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion .* share the same experts"),
        ("openai_privacy_filter", "OpenAIPrivacyFilterConfig .* has no text-generating model"),
        *((family, "Aria.* experts class AriaExperts does not go through") for family in ARIA),
    ],
)
def test_refused_families(family: str, message: str, tmp_path: Path) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    if family == "openai_privacy_filter":  # no Auto class writes it either
        tiny_config(family).save_pretrained(tmp_path / "checkpoint")
        save_file({"anything": torch.zeros(1)}, tmp_path / "checkpoint" / "model.safetensors")
    else:
        save_tiny(family, tmp_path / "checkpoint")
    with pytest.raises(ForegateError, match=message) as caught:
        foregate.convert(tmp_path / "checkpoint", tmp_path / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "qwen3_vl_moe"])
def test_every_checkpoint_layout_becomes_the_same_records(family: str, store: Folder, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 5
    model.config.save_pretrained(tmp_path / "fused")
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "fused" / "model.safetensors")  # under the model's own names, experts in 3-D tensors
    expected = (store(family) / EXPERTS_FILE).read_bytes()
    for layout in ("sharded", "fused"):
        converted = foregate.convert(tmp_path / layout, tmp_path / f"{layout}-store")
        assert (converted / EXPERTS_FILE).read_bytes() == expected


def test_mxfp4_checkpoint_is_dequantized_as_transformers_does(tmp_path: Path) -> None:
    packed = save_mxfp4(tmp_path / "checkpoint")
    converted = foregate.convert(tmp_path / "checkpoint", tmp_path / "store")
    opened = Store(converted)
    for layer, info in enumerate(opened.layers):
        for name in ("gate_up_proj", "down_proj"):
            key = f"{info.module}.{name}"
            weights = convert_moe_packed_tensors(packed[f"{key}_blocks"], packed[f"{key}_scales"])
            for expert in range(info.num_experts):
                found = read_record(opened, layer, expert)[name]
                assert found.dtype == torch.bfloat16
                assert torch.equal(found, weights[expert].T)  # records are [out, in]

    quantization = Mxfp4Config(dequantize=True)
    reference = auto_class(tiny_config("gpt_oss")).from_pretrained(
        tmp_path / "checkpoint", quantization_config=quantization, dtype=torch.bfloat16
    )
    reference = reference.float().eval()
    model = foregate.load(converted, memory="50%")
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-5)
    model.foregate.close()


def save_mxfp4(path: Path) -> dict[str, torch.Tensor]:
    """Write a tiny gpt-oss as it was released: experts in blocks of 32 four-bit numbers, each block with a scale."""
    save_tiny("gpt_oss", path)
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            shape = (experts, outer, inner // 32)
            tensors[f"{key}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{key}_scales"] = torch.randint(119, 124, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[key] = tensor.to(torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype", None)  # as released: the precision is not said
    keep = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": keep}
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def read_record(store: Store, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """One expert's tensors as they lie in the store."""
    offset, nbytes = store.location((layer, expert))
    with open(store.path / EXPERTS_FILE, "rb") as file:
        file.seek(offset)
        record = torch.frombuffer(bytearray(file.read(nbytes)), dtype=torch.uint8)
    return store.layers[layer].layout.unpack(record)


def smallest_budget(store: Path, memory: str) -> str:
    """Replace "smallest" by the share that holds exactly one layer's top-k."""
    if memory != "smallest":
        return memory
    opened = Store(store)
    return f"{100 * opened.top_k / opened.num_experts}%"
