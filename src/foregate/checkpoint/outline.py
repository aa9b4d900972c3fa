"""What a checkpoint's store will hold, by size, from the model's configuration alone."""

import torch

from foregate.checkpoint.architecture import Architecture, backbone_matrices
from foregate.checkpoint.store import UNQUANTIZED, Contents, LayerInfo, MatrixInfo, RecordLayout


def outline(architecture: Architecture, bits: int, backbone_bits: int) -> Contents:
    """The records and matrices of a conversion to `bits` and `backbone_bits`, as `convert` would make them.

    A backbone's matrix that only shares a checkpoint's tensor with others is counted as quantized here, and kept there.
    """
    layers = tuple(
        LayerInfo(
            layer.name, layer.num_experts, layer.top_k, RecordLayout.at(bits, _params(layer.params, architecture.dtype))
        )
        for layer in architecture.layers
    )
    wanted = {} if backbone_bits == UNQUANTIZED else backbone_matrices(architecture).shapes
    return Contents(layers, tuple(MatrixInfo(module, shape, backbone_bits) for module, shape in wanted.items()))


def _params(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
