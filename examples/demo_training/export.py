"""The finished model as a folder that transformers loads: bf16 safetensors, tokenizer, configs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from .corpus import Corpus
from .model import SHAPES, MoeModel


def export(name: str, checkpoint: Path, folder: Path, cache: Path) -> None:
    """Write ``checkpoint``'s weights to ``folder``."""
    tokenizer = Corpus(cache).tokenizer
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    weights = {
        key.removeprefix("model."): tensor for key, tensor in load_file(checkpoint).items() if key.startswith("model.")
    }
    trained = MoeModel(SHAPES[name])
    trained.load_state_dict(weights)
    config = SHAPES[name].transformers_config(tokenizer.model_max_length, **tokens)
    model = trained.to_transformers(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=200, **tokens)
    model.save_pretrained(folder)
    # Traces of where this tokenizer was loaded from would be written to its configuration.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    # The chat template goes into tokenizer_config.json instead of a file of its own.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
