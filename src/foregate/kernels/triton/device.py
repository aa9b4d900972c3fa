"""What the decode and the grouped kernels share: biases, rows of the first matrix, activations. Runs on the device.

Clamps and rectifiers are comparisons, so that NaN stays NaN on every card.
"""

import triton
import triton.language as tl


@triton.jit
def bias_of(record, rows, BIAS: tl.constexpr, BIAS_TYPE: tl.constexpr):
    """The bias of some rows, float32; zero where the matrix has none."""
    if BIAS < 0:
        return tl.zeros(rows.shape, tl.float32)
    else:
        return tl.load((record + BIAS).to(tl.pointer_type(BIAS_TYPE)) + rows).to(tl.float32)


@triton.jit
def first_rows(start, ROWS: tl.constexpr, INNER: tl.constexpr, LAYOUT: tl.constexpr):
    """Rows of an expert's first matrix that make inner values from `start` on; with a gate: gate, up, gate, up.

    Past the last inner value the last is repeated: such rows are computed and not stored.
    """
    row = tl.arange(0, ROWS)
    if LAYOUT == "ungated":
        return tl.minimum(start + row, INNER - 1)
    else:
        inner = tl.minimum(start + row // 2, INNER - 1)
        if LAYOUT == "interleaved":
            return 2 * inner + row % 2
        else:
            return inner + row % 2 * INNER


@triton.jit
def function_of(v, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """silu, gelu_tanh, gelu, relu2 or relu, as `cpu.Activation` defines them."""
    if FUNCTION == "silu":
        return v * tl.sigmoid(ALPHA * v)
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif FUNCTION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif FUNCTION == "relu2":
        return tl.where(v < 0, 0.0, v * v)
    else:
        tl.static_assert(FUNCTION == "relu")
        return tl.where(v < 0, 0.0, v)


@triton.jit
def activate(
    first,
    LAYOUT: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """Inner values [tokens, inner] from what the first matrix gives, [tokens, rows] in the order of `first_rows`."""
    if LAYOUT == "ungated":
        return function_of(first, FUNCTION, ALPHA)
    else:
        gate, up = tl.split(tl.reshape(first, (first.shape[0], first.shape[1] // 2, 2)))
        if float("inf") != LIMIT:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        return function_of(gate, FUNCTION, ALPHA) * (up + UP_OFFSET)
