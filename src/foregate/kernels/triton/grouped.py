"""Prompts: rows sorted by slot, cut into tiles of one expert each, whose weights become floats in registers only.

A tile multiplies its tokens with a block of 64 columns at a time: the codes of one place of the bytes are consecutive
columns, so a byte tile gives as many matrix products as it has codes per byte. Weights are rounded to the tokens' dtype
(float32 stays exact), sums are float32. A row's sum does not depend on its tile.
"""

import torch
import triton
import triton.language as tl

from foregate.kernels.triton.device import activate, bias_of, first_rows


def tiles(slots: torch.Tensor, experts: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How rows with these slots, int32 [n], are cut into tiles of up to `tokens` rows of one slot.

    experts: the most different slots there can be. Returns (order int32 [n], rows sorted by slot; starts int32
    [tiles + 1]): tile t has the rows order[starts[t]:starts[t + 1]], tiles at the end may be empty. The host does not
    wait for the device.
    """
    count = len(slots)
    ordered, order = torch.sort(slots.clamp(min=-1), stable=True)
    index = torch.arange(count, device=slots.device)
    new = torch.ones(count, dtype=torch.bool, device=slots.device)
    new[1:] = ordered[1:] != ordered[:-1]
    group_start = torch.where(new, index, 0).cummax(0).values
    tile = ((index - group_start) % tokens == 0).cumsum(0) - 1
    starts = torch.full((most_tiles(count, experts, tokens) + 1,), count, dtype=torch.int64, device=slots.device)
    starts.scatter_reduce_(0, tile, index, "amin")
    return order.int(), starts.int()


def most_tiles(rows: int, experts: int, tokens: int) -> int:
    """The most tiles that rows of so many experts, and of no expert, can be cut into."""
    return rows // tokens + min(rows, experts + 1)


@triton.jit
def tile_products(
    record,
    rows,
    x,
    lines,
    here,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    BASE: tl.constexpr,
):
    """x[lines] times some rows of a matrix, float32 [lines, rows]; x has COLS columns."""
    WIDTH: tl.constexpr = 8 // PARTS
    STRIDE: tl.constexpr = 64 // PARTS
    BLOCKS: tl.constexpr = (COLS + 63) // 64
    base = tl.load((record + BASE).to(tl.pointer_type(tl.float32)))
    byte = tl.arange(0, STRIDE)
    from_rows = x + lines.to(tl.int64)[:, None] * COLS
    acc = tl.zeros((lines.shape[0], rows.shape[0]), tl.float32)
    for block in range(BLOCKS):
        places = rows * BLOCKS + block
        codes = tl.load(record + LOW + (places[:, None] * STRIDE + byte[None, :]))
        scale = base * tl.exp2(tl.load(record + SCALES + places).to(tl.float32) * (-1 / 16))
        if BITS != 2:
            zero = tl.load(record + ZEROS + places).to(tl.float32) * ((2**BITS - 1) / 255)
        for part in tl.static_range(PARTS):
            q = ((codes >> (part * WIDTH)) & (2**WIDTH - 1)).to(tl.int32)
            if BITS == 3:
                bits = tl.load(record + HIGH + (places[:, None] * 8 + part * 2 + byte[None, :] // 8)).to(tl.int32)
                q |= ((bits >> (byte % 8)[None, :]) & 1) << 2
            if BITS == 2:
                group = tl.load(record + ZEROS + places * 4 + part).to(tl.int32)
                step = scale * ((group & 15) + 1).to(tl.float32) / 16
                weights = step[:, None] * (q.to(tl.float32) - ((group >> 4).to(tl.float32) / 5)[:, None])
            else:
                weights = scale[:, None] * (q.to(tl.float32) - zero[:, None])
            column = block * 64 + part * STRIDE + byte
            values = tl.load(from_rows + column[None, :], mask=here[:, None] & (column < COLS)[None, :], other=0.0)
            acc = tl.dot(values, tl.trans(weights.to(values.dtype)), acc, input_precision="ieee")
    return acc


@triton.jit
def grouped_up(
    slots,
    slot_bytes,
    row_slots,
    row_tokens,
    order,
    starts,
    x,
    inner,
    INNER: tl.constexpr,
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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Inner values of a tile, rows in sorted order. Programs: (tiles, rows of the matrix): a wave shares weights."""
    begin, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    if begin >= end:
        return
    slot = tl.load(row_slots + tl.load(order + begin))
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    COUNT: tl.constexpr = ROWS if LAYOUT == "ungated" else ROWS // 2
    start = tl.program_id(1) * COUNT
    rows = first_rows(start, ROWS, INNER, LAYOUT)
    line = begin + tl.arange(0, TOKENS)
    here = line < end
    token = tl.load(row_tokens + tl.load(order + line, mask=here, other=0), mask=here, other=0)
    first = tile_products(record, rows, x, token, here, BITS, PARTS, COLS, LOW, HIGH, SCALES, ZEROS, BASE)
    first += bias_of(record, rows, BIAS, BIAS_TYPE)[None, :]
    result = activate(first, LAYOUT, FUNCTION, ALPHA, LIMIT, UP_OFFSET)
    column = start + tl.arange(0, COUNT)
    to = inner + line.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(to, result, mask=here[:, None] & (column < INNER)[None, :])


@triton.jit
def grouped_down(
    slots,
    slot_bytes,
    row_slots,
    row_places,
    order,
    starts,
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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile's results, each to its place. Programs as of `grouped_up`."""
    begin, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    if begin >= end:
        return
    slot = tl.load(row_slots + tl.load(order + begin))
    if slot < 0:
        return
    record = slots + slot.to(tl.int64) * slot_bytes
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(column, HIDDEN - 1)
    line = begin + tl.arange(0, TOKENS)
    here = line < end
    result = tile_products(record, rows, x, line, here, BITS, PARTS, COLS, LOW, HIGH, SCALES, ZEROS, BASE)
    result += bias_of(record, rows, BIAS, BIAS_TYPE)[None, :]
    place = tl.load(row_places + tl.load(order + line, mask=here, other=0), mask=here, other=0)
    to = outputs + place.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(to, result, mask=here[:, None] & (column < HIDDEN)[None, :])
