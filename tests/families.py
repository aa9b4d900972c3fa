"""Tiny random checkpoints of many MoE families, as the models' own `save_pretrained` writes them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from foregate.checkpoint.architecture import auto_class

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
SHARED = {
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
QWEN = {"intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 4}
LOCAL = {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2}
HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_heads": 4,
    "linear_head_dim": 16,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
SLIDING = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
DENSE_FIRST = ["dense", "sparse", "sparse"]
INKLING = {
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 8,
    "rel_extent": 16,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
TINY_TOWER = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
TOWER = {**TINY_TOWER, "depth": 1, "num_heads": 2}
SMALL_POSITIONS = {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
OUT = {"out_hidden_size": 64}
SAM = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "mlp_dim": 16,
    "output_channels": 16,
    "downsample_channels": [16, 16],
    "global_attn_indexes": [0],
}
OCR = {
    "text_config": {
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "mlp_layer_types": DENSE_FIRST,
    },
    "vision_config": {
        "sam_config": SAM,
        "encoder_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**QWEN, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {**QWEN, **HYBRID, "shared_expert_intermediate_size": 64},
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "flex_olmo": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {
        **LOCAL,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "phimoe": LOCAL,
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 48},
    "glm4_moe": SHARED,
    "glm4_moe_lite": {**DEEPSEEK, "n_group": 1, "head_dim": 16},
    "minimax": {
        **LOCAL,
        "head_dim": 16,
        "block_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "minimax_m2": {**LOCAL, "head_dim": 16},
    "ernie4_5_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "dots1": SHARED,
    "lfm2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "hunyuan_v1_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": [48] * 3,
        "num_experts": 8,
        "moe_topk": [2] * 3,
        "head_dim": 16,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_shared_expert_intermediate_size": 48,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "use_mamba_kernels": False,
    },
    "bailing_hybrid": {**DEEPSEEK, **LINEAR, "num_experts": 8, "num_shared_experts": 1},
    "exaone_moe": {**QWEN, "head_dim": 16},
    "afmoe": {**QWEN, "head_dim": 16},
    "solar_open": SHARED,
    "hy_v3": {**QWEN, "head_dim": 16},
    "deepseek_v32": DEEPSEEK,
    "mimo_v2_flash": {**SHARED, "v_head_dim": 16},
    "axk1": DEEPSEEK,
    "laguna": {**QWEN, "head_dim": 16},
    "cohere2_moe": {**QWEN, "head_dim": 16, "logit_scale": 1.0},
    "qwen3_5_moe_text": {**QWEN, **HYBRID, "shared_expert_intermediate_size": 64},
    "kimi_linear": {**DEEPSEEK, **LINEAR, "num_experts": 8},
    "mellum": {**QWEN, "head_dim": 16},
    "muse_spark": {
        "text_config": {**LOCAL, "head_dim": 16, "moe_intermediate_size": 48, "moe_hidden_size": 32},
        "vision_config": {"num_hidden_layers": 1, "num_attention_heads": 2, **TINY_TOWER, **SMALL_POSITIONS},
        "audio_config": {"patch_sizes": [4], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1, **OUT},
        "out_hidden_size": 64,
        "projector_hidden_size": 32,
    },
    "aria_text": {"intermediate_size": 48, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk2": {**DEEPSEEK, **INDEXER, "gated_norm_rank": 8},
    "beam": {**QWEN, **SLIDING, "n_group": 2, "topk_group": 1, "mlp_layer_types": DENSE_FIRST},
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        **INDEXER,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "dots3_note_text": {
        **DEEPSEEK,
        **INDEXER,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "sliding_window": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "moe_shared_expert_intermediate_size": 48,
    },
    "flint": {**QWEN, **SLIDING, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "gemma4_text": {
        **SLIDING,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 256,
    },
    "glm4v_moe": {
        "text_config": {**SHARED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": {**TOWER, "image_size": 8, "out_hidden_size": 64},
    },
    "glm5_next": {
        "text_config": {
            **DEEPSEEK,
            **INDEXER,
            "num_hidden_layers": 4,
            "qk_rope_head_dim": 0,
            "n_group": 1,
            "index_kpool": 2,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
        },
        "vision_config": {**TOWER, "image_size": 8, "out_hidden_size": 64, "projection_intermediate_size": 32},
    },
    "glm_moe_dsa": {**DEEPSEEK, **INDEXER, "n_group": 1},
    "granitemoe_swa": {**LOCAL, "shared_intermediate_size": 48, "sliding_window": 8},
    "granitemoehybrid": {
        **LOCAL,
        "shared_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "hy_v4": {**DEEPSEEK, **INDEXER, "n_group": 1},
    "inkling_text": {
        **INKLING,
        "intermediate_size": 96,
        "n_shared_experts": 1,
        "logits_mup_width_multiplier": 1.0,
        "mlp_layer_types": DENSE_FIRST,
    },
    "inkling2_text": {**INKLING, "unpadded_vocab_size": 250, "n_layers_per_attn_res_block": 2},
    "kolibri1": {**QWEN, **SLIDING, "shared_expert_intermediate_size": 48},
    "minimax_m3_vl_text": {
        **LOCAL,
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 48,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": DENSE_FIRST,
    },
    "mistral4": {**DEEPSEEK, "n_group": 1},
    "mistral_large4": {
        "text_config": {**DEEPSEEK, **INDEXER, "n_group": 1},
        "vision_config": {"model_type": "pixtral", **TINY_TOWER, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **QWEN,
            "head_dim": 16,
            "rope_parameters": MROPE,
        },
        "vision_config": {
            **TOWER,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {**QWEN, "head_dim": 16, "rope_parameters": MROPE},
        "vision_config": {
            **TOWER,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "audio_config": {
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        },
        "vision_start_token_id": 300,
    },
    "qwen4_exp_text": {
        **QWEN,
        **HYBRID,
        "head_dim": 32,
        "shared_expert_intermediate_size": 48,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "unlimited_ocr": OCR,
    "deepseek_ocr2": OCR,
    "zaya": {
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "router_hidden_size": 16,
    },
}
# Families published as models that also see: the checkpoint holds towers beside a text part listed above.
FAMILIES |= {
    "aria": {
        "text_config": {"model_type": "aria_text", **FAMILIES["aria_text"]},
        "vision_config": {**TINY_TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8},
        "projector_patch_to_query_dict": {4: 2},
        "image_token_index": 255,
    },
    "dots3_note": {
        "text_config": {**FAMILIES["dots3_note_text"]},
        "vision_config": {
            **TINY_TOWER,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16,
            "adapter_out_dim": 64,
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 64,
        },
    },
    "gemma4": {
        "text_config": {**FAMILIES["gemma4_text"]},
        "vision_config": {
            **TINY_TOWER,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
    },
    "inkling_mm_model": {
        "text_config": {**FAMILIES["inkling_text"]},
        "vision_config": {
            "text_hidden_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
        },
        "audio_config": {"text_hidden_size": 64, "n_mel_bins": 4, "mel_vocab_size": 8},
    },
    "inkling2": {
        "text_config": {**FAMILIES["inkling2_text"]},
        "vision_config": {
            "text_hidden_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 16,
        },
    },
    "minimax_m3_vl": {
        "text_config": {**FAMILIES["minimax_m3_vl_text"]},
        "vision_config": {**TINY_TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8},
        "projector_hidden_size": 16,
    },
    "qwen3_5_moe": {
        "text_config": {**FAMILIES["qwen3_5_moe_text"]},
        "vision_config": {**TOWER, "out_hidden_size": 64, "num_position_embeddings": 16},
    },
    "qwen4_exp": {
        "text_config": {**FAMILIES["qwen4_exp_text"]},
        "vision_config": {**TOWER, "out_hidden_size": 64, "num_position_embeddings": 16},
    },
}

# Families that are refused, each for a reason of its own: see tests/test_families.py.
REFUSED: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96},
    "llama4_text": {**LOCAL, "head_dim": 16, "intermediate_size_mlp": 96},
    "jetmoe": {**LOCAL, "kv_channels": 16},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
    },
    "longcat_flash": {
        **{name: DEEPSEEK[name] for name in DEEPSEEK if name.endswith(("_rank", "head_dim"))},
        "num_key_value_heads": 4,
        "head_dim": 16,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "n_routed_experts": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "step3p7": {
        "text_config": {
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "share_expert_dim": 48,
            "head_dim": 16,
            "mlp_layer_types": DENSE_FIRST,
        },
        "vision_config": {**TINY_TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "intermediate_size": 96,
            "moe_intermediate_size": [48, 32],
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "rope_parameters": {**MROPE, "mrope_section": [2, 2, 4]},
        },
        "vision_config": TOWER,
    },
    "diffusion_gemma": {
        "text_config": {
            **SLIDING,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "top_k_experts": 2,
            "global_head_dim": 16,
        },
        "vision_config": {"model_type": "gemma4_vision", **FAMILIES["gemma4"]["vision_config"]},
        "canvas_length": 8,
    },
    "openai_privacy_filter": {**LOCAL, "head_dim": 16},
}


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of a few layers and experts. Families that also see have a text part of their own."""
    settings = FAMILIES.get(family) or REFUSED[family]
    if "text_config" in settings:
        return AutoConfig.for_model(family, **{**settings, "text_config": {**BASE, **settings["text_config"]}})
    return AutoConfig.for_model(family, **{**BASE, **settings})


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in which no weight is left at its neutral start value."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    writer = AutoModelForImageTextToText if sees else auto_class(config)  # the class that published the checkpoint
    model = writer.from_config(config, dtype=torch.float32).eval()
    for name, param in model.named_parameters():
        std = 0.5 if "router_mlp" in name else 0.05  # ZAYA's router has layers of its own, which fade small weights
        with torch.no_grad():
            param.normal_(0, std) if param.dim() > 1 else param.add_(torch.randn_like(param) * 0.05)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name or "expert_bias" in name:
            buffer.normal_(0, 0.1)
        elif name.endswith("tid2eid"):  # DeepSeek V4 looks the experts of some layers up by token
            buffer.copy_(torch.rand(buffer.shape[0], 8).argsort(dim=1)[:, : buffer.shape[1]])
    return model


def save_tiny(family: str, path: Path, **save_options: Any) -> PreTrainedModel:
    """Write a tiny checkpoint to `path` and return the model it holds."""
    model = tiny_model(family)
    model.save_pretrained(path, **save_options)
    return model


def save_byte_tokenizer(path: Path) -> None:
    """A tokenizer with one token per byte, so that tiny models of 256 tokens read any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template).save_pretrained(path)
