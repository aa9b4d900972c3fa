"""Long prompts in pieces: memory for a pass does not grow with the prompt, where the family's code allows it."""

import torch
from transformers import PreTrainedModel

from foregate.model.experts import silent_experts

PIECE, PIECES = 8, 3  # tokens of a piece and pieces, in which a model is tried
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative; sums are taken in another order


def piece_size(model: PreTrainedModel, tokens: int, most: int) -> int | None:
    """How many tokens of a prompt of so many to compute at a time: `most`, or None for all at once.

    A prompt that is not longer is computed at once, and so is any prompt of a family whose own code gives other results
    when it continues from a cache by several tokens.
    """
    return most if tokens > most and takes_pieces(model) else None


@torch.inference_mode()
def takes_pieces(model: PreTrainedModel) -> bool:
    """Whether a short text gives the same logits whole and in pieces; the experts are left out, and nothing is loaded."""
    experts = [model.get_submodule(layer.module) for layer in model.foregate.store.layers]
    ids = torch.arange(PIECE * PIECES, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    settings = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "pad_token_id": 0, "output_logits": True}
    with silent_experts(experts):
        try:
            whole, pieces = (
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    prefill_chunk_size=size,
                    return_dict_in_generate=True,
                    **settings,
                ).logits[0]
                for size in (None, PIECE)
            )
        except ValueError:  # transformers: there is no cache to go on from
            return False
    return bool((whole - pieces).norm() <= TOLERANCE[model.dtype] * whole.norm())
