"""Lookahead gates, each in one native call: a ctypes binding of `foregate/native/foregate.h`.

What the numbers mean is said, and computed the obvious way, in `foregate.lookahead.gate` and `foregate.lookahead.reuse`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch

from foregate.kernels import cpu
from foregate.kernels.cpu import Matrix

BLOCK = 64  # columns after which the MLP's second part begins


class _History(ctypes.Structure):
    _fields_ = (
        *((size, ctypes.c_int64) for size in ("experts", "half_lives")),
        *((array, ctypes.c_void_p) for array in ("decays", "scores", "uses", "ages")),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        ("normalize", ctypes.c_int32),
        *((matrix, cpu._Matrix) for matrix in ("base", "down", "up")),
        *((bias, ctypes.c_void_p) for bias in ("base_bias", "down_bias")),
        ("targets", ctypes.c_int64),
        *((array, ctypes.c_void_p) for array in ("aims", "top_k", "scales", "shifts", "own")),
        ("windows", ctypes.c_int64),
        *((array, ctypes.c_void_p) for array in ("reuse_up", "reuse_bias", "reuse_shared")),
    )


class History:
    """What a layer's router gave the newest token, and how the sequence has used the layer's experts.

    half_lives: tokens, of the decayed sums of uses. never: tokens, the age of an expert that was not used yet.
    """

    def __init__(self, experts: int, half_lives: Sequence[float], never: float) -> None:
        self._decays = np.array([0.5 ** (1 / tokens) for tokens in half_lives], np.float32)
        self.scores = np.zeros(experts, np.float32)
        self.uses = np.zeros((len(half_lives), experts), np.float32)
        self.ages = np.full(experts, never, np.float32)
        arrays = (self._decays, self.scores, self.uses, self.ages)
        self._struct = _History(experts, len(half_lives), *(array.ctypes.data for array in arrays))
        self.address, self._library, self._experts = ctypes.addressof(self._struct), _library(), experts

    def observe(self, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        """scores: float32 [the newest tokens, experts or more]; chosen: int64 [tokens, top_k], oldest token first, where an
        index outside the experts is none. Of the scores only the last row is read, so there may be fewer rows than
        choices. Raises ValueError when shapes, dtypes or memory layouts do not fit."""
        (scored, columns), (tokens, top_k) = scores.shape, chosen.shape
        if columns < self._experts or not 0 < scored <= tokens:
            raise ValueError(f"scores {list(scores.shape)} and choices {list(chosen.shape)} of {self._experts} experts")
        _check_dense(scores, "scores", torch.float32)
        _check_dense(chosen, "chosen", torch.int64)
        newest = scores.data_ptr() + 4 * columns * (scored - 1)
        status = self._library.fg_observe(self.address, newest, chosen.data_ptr(), tokens, top_k)
        cpu._check(self._library, status)


@dataclass(frozen=True)
class Mlp:
    """The learned part of a gate: up(silu(down([source, zeros up to a multiple of 64, scores]) + bias)).

    down: [width, source + zeros + outputs]; bias: float32 [width]; up: [outputs, width].
    """

    down: Matrix
    bias: np.ndarray
    up: Matrix


@dataclass(frozen=True)
class Reuse:
    """A reuse head. Its first product is part of the gate's.

    history: of its layer; up: float32 [windows, experts, width]; bias: float32 [windows, experts]; shared: float32
    [windows, half-lives + 2].
    """

    history: History
    up: np.ndarray
    bias: np.ndarray
    shared: np.ndarray


class Gate:
    """The gate of one source and the reuse head of its layer. Quantized matrices read int8 activations."""

    def __init__(
        self,
        base: Matrix,
        bias: np.ndarray,
        aims: Sequence[History],
        top_k: Sequence[int],
        scales: np.ndarray,
        shifts: np.ndarray,
        mlp: Mlp | None = None,
        reuse: Reuse | None = None,
        normalize: bool = False,
    ) -> None:
        """base: [outputs + the reuse head's width, source]; bias: float32 [its rows]; aims: histories of the layers
        predicted; top_k, scales, shifts: of each, the latter of the probabilities, float32; normalize: whether
        tokens are divided by their root mean square first."""
        self._held: list[object] = [base, *aims, mlp, reuse]  # the struct holds addresses of their memory
        gate = _Gate(normalize=normalize, base=cpu._matrix(base), base_bias=self._hold(bias), targets=len(aims))
        gate.aims = self._hold(np.array([aim.address for aim in aims], np.uintp))
        gate.top_k = self._hold(np.array(top_k, np.int64))
        gate.scales, gate.shifts = self._hold(scales), self._hold(shifts)
        if mlp:
            gate.down, gate.up = cpu._matrix(mlp.down), cpu._matrix(mlp.up)
            gate.down_bias = self._hold(mlp.bias)
        ends = list(accumulate(len(aim.scores) for aim in aims))
        self._spans, self._outputs, self._reuse_shape = list(zip([0, *ends[:-1]], ends, strict=True)), ends[-1], None
        if reuse:
            gate.own, gate.windows = reuse.history.address, len(reuse.up)
            gate.reuse_up, gate.reuse_bias = self._hold(reuse.up), self._hold(reuse.bias)
            gate.reuse_shared = self._hold(reuse.shared)
            self._reuse_shape = reuse.bias.shape
        self._inputs, self._gate = cpu._shape(base)[1], gate
        answers = self._outputs + (reuse.bias.size if reuse else 0)
        self._answers, self._library = ctypes.c_float * answers, _library()

    def __call__(self, x: torch.Tensor) -> tuple[list[np.ndarray], np.ndarray | None]:
        """x: float32 [tokens, source], contiguous. Returns for each target the probabilities [experts] that any of the
        tokens makes it choose the expert, and those of reuse [windows, experts] after the last token, or None. Raises
        ValueError when x does not fit."""
        tokens, inputs = x.shape
        if inputs != self._inputs or not tokens:
            raise ValueError(f"x has shape {list(x.shape)} where tokens of {self._inputs} numbers are needed")
        _check_dense(x, "x", torch.float32)
        answers = self._answers()
        cpu._check(self._library, self._library.fg_predict(self._gate, x.data_ptr(), tokens, answers))
        values = np.frombuffer(answers, np.float32)
        ahead = [values[start:end] for start, end in self._spans]
        return ahead, values[self._outputs :].reshape(self._reuse_shape) if self._reuse_shape else None

    def _hold(self, array: np.ndarray) -> int:
        """The address of the array's numbers, which stay as long as the gate does."""
        array = np.ascontiguousarray(array)
        self._held.append(array)
        return array.ctypes.data


def _check_dense(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """As `cpu._check_tensor`, whatever the shape. Caches are cold here in a run, so every call into PyTorch counts."""
    if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        cpu._check_tensor(tensor, name, dtype, tuple(tensor.shape))


@cache
def _library() -> ctypes.CDLL:
    """The library with its gates declared. Raises ForegateError where there is none."""
    library, pointer, integer = cpu._library(), ctypes.c_void_p, ctypes.c_int64
    library.fg_observe.argtypes = [pointer, pointer, pointer, integer, integer]
    library.fg_predict.argtypes = [ctypes.POINTER(_Gate), pointer, integer, pointer]
    return library
