"""Decode: one row at a time, bound by the memory that holds the weights.

Weights are read as 32-bit words, 16 bytes a thread, and are never converted. A code that is masked out of a word, read as
a float, is a subnormal number: q at bit p of a mantissa is q * 2**(p - 149). The activation that it meets was multiplied
by 2**(LIFT - p) beforehand, so that the product is q * x * 2**(LIFT - 149), exact in one instruction and of ordinary
size; what all have in common goes into the block's scale. That takes two instructions a weight where converting takes
five, and fast memory leaves a card little time for more. Activations beyond 2**37 overflow, those below 2**-60 lose bits.

Activations come in *code order*, so that the codes at one place of consecutive words meet consecutive activations: place
(part, byte) of word w in a block holds column 64 / parts * part + 4 w + byte. `code_order` brings hidden states into it,
and the first kernel writes inner values in it.

Every sum has one order, given by the shape and the configuration. Nothing is atomic.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.nn import functional

from foregate.kernels.triton.device import activate, bias_of, first_rows
from foregate.quantize.matrix import BLOCK

LIFT = tl.constexpr(90)


def code_order(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Activations as decode kernels read them: float32 [tokens, 4 * parts, blocks * words].

    x: any float [tokens, cols]; columns past the last are zero. parts: of the matrix that they meet.
    """
    ragged = -x.shape[1] % BLOCK
    if ragged:
        x = functional.pad(x, (0, ragged))
    ordered = x.view(x.shape[0], -1, parts, 16 // parts, 4).permute(0, 2, 4, 1, 3)
    lifted = torch.empty(ordered.shape, device=x.device)
    torch.mul(ordered, _lifts(parts, x.device), out=lifted)
    return lifted.flatten(3).flatten(1, 2)


@functools.cache
def _lifts(parts: int, device: torch.device) -> torch.Tensor:
    """What activations are multiplied by, float32 [parts, 4, 1, 1]: a word's upper half is moved down to the lower."""
    part, byte = torch.arange(parts)[:, None], torch.arange(4)
    place = (8 * byte + 8 // parts * part) % 16
    return torch.exp2(LIFT.value - place.double()).float()[:, :, None, None].to(device)


@functools.cache
def tokens_of_rows(tokens: int, top_k: int, device: torch.device) -> torch.Tensor:
    """Each row's token where every token has k rows: int32 [tokens * k]."""
    return torch.arange(tokens * top_k, dtype=torch.int32, device=device) // top_k


def code_order_like(rows: int, cols: int, parts: int, device: torch.device) -> torch.Tensor:
    """Memory for values in code order; zeros where a ragged last block would leave some unwritten."""
    blocks = -(-cols // BLOCK)
    make = torch.zeros if cols % BLOCK else torch.empty
    return make(rows, 4 * parts, blocks * 16 // parts, device=device)


@triton.jit
def store_code_order(to, column, values, PARTS: tl.constexpr, COLS: tl.constexpr):
    """Write values of some columns, lifted, to their places in code order."""
    STRIDE: tl.constexpr = 64 // PARTS
    BLOCKS: tl.constexpr = (COLS + 63) // 64
    within = column % 64
    part, byte = within // STRIDE, within % 4
    place = ((part * 4 + byte) * BLOCKS + column // 64) * (STRIDE // 4) + within % STRIDE // 4
    bit = (8 * byte + 8 // PARTS * part) % 16
    lift = ((-bit + (LIFT + 127)) << 23).to(tl.float32, bitcast=True)
    tl.store(to + place, values * lift, mask=column < COLS)


@triton.jit
def row_products(
    record,
    rows,
    x,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    BASE: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of some rows of a matrix with activations in code order, float32 [rows]; WIDE blocks at a time.

    A block's part of the sum of s (q - z) x is s (sum(q x) - z sum(x)).
    """
    WIDTH: tl.constexpr = 8 // PARTS  # bits of a code in the plane "low"
    MASK: tl.constexpr = 2**WIDTH - 1
    WORDS: tl.constexpr = 16 // PARTS  # of a block
    BLOCKS: tl.constexpr = (COLS + 63) // 64
    low = (record + LOW).to(tl.pointer_type(tl.int32))
    base = tl.load((record + BASE).to(tl.pointer_type(tl.float32)))
    word = tl.arange(0, WORDS)
    acc = tl.zeros((rows.shape[0], WIDE), tl.float32)
    for start in tl.range(0, BLOCKS, WIDE, num_stages=STAGES):
        block = start + tl.arange(0, WIDE)
        places = rows[:, None] * BLOCKS + tl.minimum(block, BLOCKS - 1)[None, :]
        words = tl.load(low + (places[:, :, None] * WORDS + word[None, None, :]))
        upper = words >> 16
        at = x + (block[:, None] * WORDS + word[None, :])
        here = (block < BLOCKS)[:, None]  # past the last block activations are zero
        scale = base * tl.exp2(tl.load(record + SCALES + places).to(tl.float32) * (-1 / 16))
        if BITS == 2:
            groups = tl.load((record + ZEROS).to(tl.pointer_type(tl.int32)) + places)
        else:
            zero = tl.load(record + ZEROS + places).to(tl.float32) * ((2**BITS - 1) / 255)
        product = tl.zeros(words.shape, tl.float32)
        total = tl.zeros(at.shape, tl.float32)
        for part in tl.static_range(PARTS):
            if BITS == 3:
                high = tl.load((record + HIGH).to(tl.pointer_type(tl.int32)) + places * 2 + part // 2)
                high = high[:, :, None] >> (4 * word)[None, None, :]
            for byte in tl.static_range(4):  # its code is at bit 8 * (byte % 2) + WIDTH * part of half a word
                values = tl.load(at + (part * 4 + byte) * BLOCKS * WORDS, mask=here, other=0.0)
                code = (words if byte < 2 else upper) & (MASK << 8 * (byte % 2) + WIDTH * part)
                if BITS == 3:  # from bit 16 * (part % 2) + byte to the bit above the other two
                    if 8 * (byte % 2) + 2 * part + 2 > 16 * (part % 2) + byte:
                        top = high << (8 * (byte % 2) + 2 * part + 2 - 16 * (part % 2) - byte)
                    else:
                        top = high >> (16 * (part % 2) + byte - 8 * (byte % 2) - 2 * part - 2)
                    code |= top & (4 << 8 * (byte % 2) + 2 * part)
                product = tl.fma(code.to(tl.float32, bitcast=True), values[None, :, :], product)
                total = tl.fma(values, 2.0 ** (8 * (byte % 2) + WIDTH * part - LIFT), total)
            if BITS == 2:  # every part is a group with a multiplier and a zero point
                group = groups >> (8 * part)
                share = ((group & 15) + 1).to(tl.float32) / 16
                zero = ((group >> 4) & 15).to(tl.float32) / 5
                acc += scale * share * (tl.sum(product, 2) * 2.0 ** (149 - LIFT) - zero * tl.sum(total, 1)[None, :])
                product = tl.zeros(words.shape, tl.float32)
                total = tl.zeros(at.shape, tl.float32)
        if BITS != 2:
            acc += scale * (tl.sum(product, 2) * 2.0 ** (149 - LIFT) - zero * tl.sum(total, 1)[None, :])
    return tl.sum(acc, 1)


@triton.jit
def decode_up(
    slots,
    slot_bytes,
    row_slots,
    row_tokens,
    x,
    inner,
    INNER: tl.constexpr,
    NEXT_PARTS: tl.constexpr,
    LAYOUT: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Inner values of one row, in code order for the next matrix. Programs: (rows of work, rows of the matrix)."""
    line = tl.program_id(0)
    slot = tl.load(row_slots + line)
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    COUNT: tl.constexpr = ROWS if LAYOUT == "ungated" else ROWS // 2  # inner values
    SIZE: tl.constexpr = (COLS + 63) // 64 * 64
    start = tl.program_id(1) * COUNT
    rows = first_rows(start, ROWS, INNER, LAYOUT)
    values = x + tl.load(row_tokens + line) * SIZE
    first = row_products(record, rows, values, BITS, PARTS, COLS, LOW, HIGH, SCALES, ZEROS, BASE, WIDE, STAGES)
    first += bias_of(record, rows, BIAS, BIAS_TYPE)
    result = activate(first[None, :], LAYOUT, FUNCTION, ALPHA, LIMIT, UP_OFFSET)
    column = (start + tl.arange(0, COUNT))[None, :]
    NEXT_SIZE: tl.constexpr = (INNER + 63) // 64 * 64
    store_code_order(inner + line * NEXT_SIZE, column, result, NEXT_PARTS, INNER)


@triton.jit
def decode_down(
    slots,
    slot_bytes,
    row_slots,
    row_places,
    x,
    outputs,
    HIDDEN: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """An expert's result for one row, to its place. Programs: (rows of work, rows of the matrix)."""
    line = tl.program_id(0)
    slot = tl.load(row_slots + line)
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    SIZE: tl.constexpr = (COLS + 63) // 64 * 64
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(column, HIDDEN - 1)
    result = row_products(
        record, rows, x + line * SIZE, BITS, PARTS, COLS, LOW, HIGH, SCALES, ZEROS, BASE, WIDE, STAGES
    )
    result += bias_of(record, rows, BIAS, BIAS_TYPE)
    tl.store(outputs + tl.load(row_places + line).to(tl.int64) * HIDDEN + column, result, mask=column < HIDDEN)


@triton.jit
def decode_down_sum(
    slots,
    slot_bytes,
    row_slots,
    row_weights,
    x,
    outputs,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A token's k results and their weighted sum. Programs: (tokens, rows of the matrix)."""
    token = tl.program_id(0)
    SIZE: tl.constexpr = (COLS + 63) // 64 * 64
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(column, HIDDEN - 1)
    total = tl.zeros((ROWS,), tl.float32)
    for rank in range(TOP_K):
        line = token * TOP_K + rank
        slot = tl.load(row_slots + line)
        if slot >= 0:
            record = slots + slot.to(tl.int64) * slot_bytes
            result = row_products(
                record, rows, x + line * SIZE, BITS, PARTS, COLS, LOW, HIGH, SCALES, ZEROS, BASE, WIDE, STAGES
            )
            result += bias_of(record, rows, BIAS, BIAS_TYPE)
            total = tl.fma(tl.load(row_weights + line), result, total)
    tl.store(outputs + token * HIDDEN + column, total, mask=column < HIDDEN)


@triton.jit
def weighted_sum(
    results, row_slots, row_weights, outputs, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr
):
    """The sum of `decode_down_sum` alone, over results already at their places. Programs: (tokens, columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = column < HIDDEN
    total = tl.zeros((ROWS,), tl.float32)
    for rank in range(TOP_K):
        line = token * TOP_K + rank
        if tl.load(row_slots + line) >= 0:
            result = tl.load(results + line * HIDDEN + column, mask=here, other=0.0)
            total = tl.fma(tl.load(row_weights + line), result, total)
    tl.store(outputs + token * HIDDEN + column, total, mask=here)
