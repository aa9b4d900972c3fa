"""Tiny random checkpoints of many MoE families, as the models' own `save_pretrained` writes them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

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
    "bailing_hybrid": {**DEEPSEEK, "num_hidden_layers": 4, "num_experts": 8, "num_shared_experts": 1, "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"], "linear_num_heads": 4, "linear_head_dim": 16},
    "exaone_moe": {**QWEN, "head_dim": 16},
    "afmoe": {**QWEN, "head_dim": 16},
    "solar_open": SHARED,
    "hy_v3": {**QWEN, "head_dim": 16},
    "deepseek_v32": DEEPSEEK,
    "mimo_v2_flash": {**SHARED, "v_head_dim": 16},
    "axk1": DEEPSEEK,
    "laguna": {**QWEN, "head_dim": 16},
    "cohere2_moe": {**QWEN, "head_dim": 16},
    "qwen3_5_moe_text": {**QWEN, **HYBRID, "shared_expert_intermediate_size": 64},
    "kimi_linear": {**DEEPSEEK, "num_hidden_layers": 4, "num_experts": 8, "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"], "linear_num_heads": 4, "linear_head_dim": 16},
    "mellum": {**QWEN, "head_dim": 16},
    "muse_spark": {**QWEN, "head_dim": 16},
}


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of a few layers and experts."""
    return AutoConfig.for_model(family, **{**BASE, **FAMILIES[family]})


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in which no weight is left at its neutral start value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    for param in model.parameters():
        with torch.no_grad():
            param.normal_(0, 0.05) if param.dim() > 1 else param.add_(torch.randn_like(param) * 0.05)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.1)
    return model


def save_tiny(family: str, path: Path, **save_options: Any) -> PreTrainedModel:
    """Write a tiny checkpoint to `path` and return the model it holds."""
    model = tiny_model(family)
    model.save_pretrained(path, **save_options)
    return model
