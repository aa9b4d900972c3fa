"""Linear modules whose weights stay quantized: they compute straight from the records of a store's matrices file."""

from io import FileIO

import torch
from torch import nn
from transformers import PreTrainedModel

from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.kernels import Product
from foregate.memory.pages import allocate
from foregate.quantize.matrix import QuantizedMatrix


class QuantizedLinear(nn.Module):
    """In the place of an `nn.Linear`: same call and bias, no weight of its own; `connect` gives it a matrix.

    A token's result does not depend on the tokens beside it, bit for bit.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._matrix: QuantizedMatrix | None = None
        self._product: Product | None = None

    def connect(self, matrix: QuantizedMatrix, product: Product) -> None:
        """Compute with `matrix` [out, in], whose `product` is a kernel's."""
        self._matrix, self._product = matrix, product

    @property
    def weight(self) -> torch.Tensor:
        """The weight, float32 [out, in], made anew every time it is asked for."""
        if self._matrix is None:
            raise RuntimeError("this linear module is not connected to a matrix: load the model with foregate.load")
        return self._matrix.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in]; returns [..., out] in the dtype of x."""
        if self._product is None:
            raise RuntimeError("this linear module is not connected to a matrix: load the model with foregate.load")
        tokens = x.reshape(-1, self.in_features).to(torch.float32).contiguous()
        y = self._product(tokens)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bits = None if self._matrix is None else self._matrix.bits
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


def with_quantized_linears(model_class: type[PreTrainedModel], modules: list[str]) -> type[PreTrainedModel]:
    """A subclass of `model_class` that builds these modules as `QuantizedLinear`; it looks like the class itself.

    The modules are swapped at the end of the model's own constructor: transformers then neither asks the checkpoint for
    their weights nor makes any.
    """

    def __init__(self: PreTrainedModel, *args: object, **kwargs: object) -> None:
        model_class.__init__(self, *args, **kwargs)
        for name in modules:
            self.set_submodule(name, QuantizedLinear(self.get_submodule(name)))

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__, "__init__": __init__}
    return type(model_class.__name__, (model_class,), names)


def read_matrices(store: Store) -> list[QuantizedMatrix]:
    """The matrices of a store's backbone: views of one page-aligned block that is read from the file once.

    Raises ForegateError when the file cannot be read.
    """
    memory = allocate(store.matrices_bytes)
    start, _ = store.matrix_location(0)
    try:
        with FileIO(store.matrices_path) as file:
            file.seek(start)
            _fill(memory, file)
    except OSError as error:
        what = error.strerror or "the file ended early"
        raise ForegateError(f"{store.matrices_path} cannot be read ({what}); run foregate verify") from None
    block = torch.frombuffer(memory, dtype=torch.uint8)
    offsets = [store.matrix_location(index)[0] - start for index in range(len(store.matrices))]
    return [
        matrix.layout.unpack(block[offset : offset + matrix.nbytes])["weight"]
        for matrix, offset in zip(store.matrices, offsets, strict=True)
    ]


def _fill(buffer: memoryview, file: FileIO) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError
        buffer = buffer[count:]
