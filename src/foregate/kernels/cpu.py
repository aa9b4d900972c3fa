"""The native kernels: products of quantized or plain matrices with tokens, and whole experts, on the CPU.

A ctypes binding of `foregate/native/foregate.h`. Tensors are passed by address, nothing is copied, and the GIL is
released while a kernel runs; calls from several threads take turns. A token's result is the same bit for bit whatever
other tokens are in the call and however many threads work. It depends on the instruction set: `FOREGATE_ISA` in the
environment, or `use_isa`, chooses another than the best.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from pathlib import Path

import torch

import foregate
from foregate.errors import ForegateError
from foregate.quantize.matrix import QuantizedMatrix, plane_shapes

Matrix = QuantizedMatrix | torch.Tensor  # plain: bfloat16, float16 or float32 [rows, cols]

_INTERFACE = 4  # FG_INTERFACE
_KINDS = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}  # enum fg_kind; quantized kinds are their bits
_FUNCTIONS = ("silu", "gelu_tanh", "gelu", "relu2", "relu")  # enum fg_function
_LAYOUTS = ("ungated", "concatenated", "interleaved")  # enum fg_layout


@dataclass(frozen=True)
class Activation:
    """What an expert does between its products: function(gate) * (up + up_offset), or function(up) without a gate.

    function: "silu" (v * sigmoid(alpha * v)), "gelu_tanh", "gelu" (by erf), "relu2" (squared) or "relu". layout: rows
    of the first matrix are "ungated" up; "concatenated" gate, then up; or "interleaved" gate, up, gate, up. The gate is
    clamped to at most `limit`, up to -limit..limit.
    """

    function: str = "silu"
    layout: str = "concatenated"
    alpha: float = 1.0
    limit: float = inf
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in _FUNCTIONS:
            raise ValueError(f"no activation function {self.function!r}, only {', '.join(_FUNCTIONS)}")
        if self.layout not in _LAYOUTS:
            raise ValueError(f"no layout {self.layout!r}, only {', '.join(_LAYOUTS)}")
        if not self.limit > 0:
            raise ValueError(f"the limit of an activation must be positive, not {self.limit}")


GPT_OSS = Activation("silu", "interleaved", alpha=1.702, limit=7.0, up_offset=1.0)


@dataclass(frozen=True)
class Expert:
    """An expert's weights. up: [inner, hidden], gated: [2 * inner, hidden]; down: [hidden, inner]; biases: [rows]."""

    up: Matrix
    down: Matrix
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @cached_property
    def addresses(self) -> "tuple[_Matrix, _Matrix, _Bias, _Bias]":
        """Where the weights lie, checked once: an expert is used many times. Raises ValueError when they do not fit."""
        up_bias, down_bias = _bias(self.up_bias, _shape(self.up)[0]), _bias(self.down_bias, _shape(self.down)[0])
        return _matrix(self.up), _matrix(self.down), up_bias, down_bias


@dataclass(frozen=True)
class Work:
    """An expert and the tokens routed to it.

    sources: int64 [n], rows of the input; destinations: int64 [n], rows of the output, all different within a call;
    weights: float32 [n], factors on the results, or None.
    """

    expert: Expert
    sources: torch.Tensor
    destinations: torch.Tensor
    weights: torch.Tensor | None = None


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        *((plane, ctypes.c_void_p) for plane in ("data", "high", "scales", "zeros", "base")),
    )


class _Bias(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("data", ctypes.c_void_p))


class _Activation(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("up_offset", ctypes.c_float),
    )


class _Expert(ctypes.Structure):
    _fields_ = (
        ("up", _Matrix),
        ("down", _Matrix),
        ("up_bias", _Bias),
        ("down_bias", _Bias),
        ("tokens", ctypes.c_int64),
        *((field, ctypes.c_void_p) for field in ("sources", "destinations", "weights")),
    )


def available() -> bool:
    """Whether the native kernels can be used. Raises ForegateError when FOREGATE_ISA names none of this machine's."""
    return not isinstance(_load(), str)


def why_not() -> str:
    """Why the native kernels cannot be used; empty when they can."""
    library = _load()
    return library if isinstance(library, str) else ""


def version() -> str:
    """The version that the library was built from."""
    return _library().fg_version().decode()


def isa() -> str:
    """The instruction set in use."""
    return _library().fg_isa().decode()


def isas() -> list[str]:
    """The instruction sets that this machine can use, best first."""
    return _library().fg_isas().decode().split(", ")


def use_isa(name: str | None) -> None:
    """Use another instruction set, None: the best. Results of different ones differ in rounding."""
    _check(_library(), _library().fg_use_isa(None if name is None else name.encode()))


def threads() -> int:
    """How many threads work on a call."""
    return _library().fg_threads()


def set_threads(count: int) -> None:
    """Let `count` threads work on a call; at first, as many as there are CPUs that this process may use."""
    _check(_library(), _library().fg_set_threads(count))


def matmul(x: torch.Tensor, matrix: Matrix, exact: bool = False) -> torch.Tensor:
    """x @ matrix.T, float32 [tokens, rows], for x float32 [tokens, cols].

    exact: keep the activations in float32; otherwise they are rounded to int8 in blocks of 64 (plain matrices are
    always exact). Raises ValueError when shapes, dtypes or memory layouts do not fit.
    """
    return Product(matrix, exact)(x)


class Product:
    """x @ matrix.T as `matmul` computes it, for a matrix that is used many times: it is checked once."""

    def __init__(self, matrix: Matrix, exact: bool = False) -> None:
        self._held = matrix  # the addresses below are its memory
        self._rows, self._cols = _shape(matrix)
        self._matrix, self._exact, self._library = _matrix(matrix), exact, _library()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, rows] for x float32 [tokens, cols]."""
        _check_tensor(x, "x", torch.float32, (None, self._cols))
        y = torch.empty(x.shape[0], self._rows)
        status = self._library.fg_matmul(x.data_ptr(), x.shape[0], self._matrix, self._exact, y.data_ptr())
        _check(self._library, status)
        return y


def expert_mlp(x: torch.Tensor, expert: Expert, activation: Activation, exact: bool = False) -> torch.Tensor:
    """One expert on all tokens: float32 [tokens, hidden] for x float32 [tokens, hidden]. Raises as `matmul` does."""
    rows = torch.arange(x.shape[0])
    y = torch.empty(x.shape[0], _shape(expert.down)[0])
    moe(x, [Work(expert, rows, rows)], activation, y, exact)
    return y


def moe(x: torch.Tensor, work: Sequence[Work], activation: Activation, y: torch.Tensor, exact: bool = False) -> None:
    """Several experts, each on its tokens: y[destination] = weight * expert(x[source]); other rows of y stay.

    x: float32 [tokens, hidden]; y: float32 [places, hidden out], not overlapping x. The experts' matrices are alike in
    shape. Raises ValueError when shapes, dtypes, indices or memory layouts do not fit.
    """
    if not work:
        return
    _check_tensor(x, "x", torch.float32, (None, _shape(work[0].expert.up)[1]))
    _check_tensor(y, "y", torch.float32, (None, _shape(work[0].expert.down)[0]))
    experts = (_Expert * len(work))(*(_work(item) for item in work))
    parameters = _Activation(
        _FUNCTIONS.index(activation.function),
        _LAYOUTS.index(activation.layout),
        activation.alpha,
        activation.limit,
        activation.up_offset,
    )
    library = _library()
    places = y.data_ptr(), y.shape[0]
    status = library.fg_moe(x.data_ptr(), x.shape[0], experts, len(work), parameters, exact, *places)
    _check(library, status)


_plane_shapes = cache(plane_shapes)


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    folders = [Path(folder) / "native" for folder in foregate.__path__]  # an editable installation has two
    file = next((file for folder in folders for file in sorted(folder.glob("libforegate.*"))), None)
    if file is None:
        return "Foregate was installed without its native kernels (no C++ compiler was found then): install it again"
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return f"the native kernels cannot be loaded: {error}"
    if not hasattr(library, "fg_interface") or library.fg_interface() != _INTERFACE:
        return f"{file} was built from other sources: install Foregate again"
    for name in ("fg_version", "fg_error", "fg_isa", "fg_isas"):
        getattr(library, name).restype = ctypes.c_char_p
    library.fg_use_isa.argtypes = [ctypes.c_char_p]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.fg_matmul.argtypes = [pointer, integer, ctypes.POINTER(_Matrix), ctypes.c_int, pointer]
    library.fg_moe.argtypes = [
        *(pointer, integer, ctypes.POINTER(_Expert), integer),
        *(ctypes.POINTER(_Activation), ctypes.c_int, pointer, integer),
    ]
    wanted = os.environ.get("FOREGATE_ISA")
    if wanted and library.fg_use_isa(wanted.encode()):
        raise ForegateError(f"FOREGATE_ISA: {library.fg_error().decode()}")
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise ForegateError(library)
    return library


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise ValueError(library.fg_error().decode())


def _check_tensor(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the tensor is as described (None in `shape`: any size), contiguous and on the CPU."""
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    for size, want in zip(sizes, shape, strict=False):
        fits = fits and (want is None or want == size)
    if fits and tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous():
        return  # at once: a decode step passes here hundreds of times
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(sizes)} where [{wanted}] is needed")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} where {dtype} is needed")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, the native kernels read the CPU's memory")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")


def _check_plain(tensor: torch.Tensor, name: str, shape: tuple[int | None, ...]) -> None:
    if tensor.dtype not in _KINDS:
        raise ValueError(f"{name} is {tensor.dtype} where bfloat16, float16 or float32 is needed")
    _check_tensor(tensor, name, tensor.dtype, shape)


def _shape(matrix: Matrix) -> tuple[int, int]:
    if isinstance(matrix, QuantizedMatrix):
        return matrix.rows, matrix.cols
    _check_plain(matrix, "a matrix", (None, None))
    return matrix.shape[0], matrix.shape[1]


def _matrix(matrix: Matrix) -> _Matrix:
    rows, cols = _shape(matrix)
    if isinstance(matrix, torch.Tensor):
        return _Matrix(_KINDS[matrix.dtype], rows, cols, matrix.data_ptr(), None, None, None, None)
    address = {}
    for name, (dtype, shape) in _plane_shapes(matrix.bits, rows, cols).items():
        if name not in matrix.planes:
            raise ValueError(f"a matrix of {matrix.bits} bits lacks its plane {name!r}")
        _check_tensor(matrix.planes[name], f"plane {name!r}", dtype, shape)
        address[name] = matrix.planes[name].data_ptr()
    zeros = address["groups" if matrix.bits == 2 else "zeros"]
    return _Matrix(
        matrix.bits, rows, cols, address["low"], address.get("high"), address["scales"], zeros, address["base"]
    )


def _bias(bias: torch.Tensor | None, rows: int) -> _Bias:
    if bias is None:
        return _Bias(0, None)
    _check_plain(bias, "a bias", (rows,))
    return _Bias(_KINDS[bias.dtype], bias.data_ptr())


def _work(item: Work) -> _Expert:
    expert, tokens = item.expert, item.sources.numel()
    _check_tensor(item.sources, "sources", torch.int64, (None,))
    _check_tensor(item.destinations, "destinations", torch.int64, (tokens,))
    if item.weights is not None:
        _check_tensor(item.weights, "weights", torch.float32, (tokens,))
    return _Expert(
        *expert.addresses,
        tokens,
        item.sources.data_ptr(),
        item.destinations.data_ptr(),
        None if item.weights is None else item.weights.data_ptr(),
    )
