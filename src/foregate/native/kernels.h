// What an instruction set has to provide, and the types that pass between it and the rest.
//
// This header and all that kernels_*.cpp include must not define inline functions with external linkage: each of those
// files is compiled for another instruction set, and the linker would keep whichever copy it finds first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "foregate.h"

namespace foregate {

constexpr int BLOCK = 64;  // columns that share a scale
constexpr int GROUP = 16;  // columns that share a multiplier and a zero point, at 2 bits
constexpr int CHUNK = 16;  // blocks whose scales are decoded together; prepared rows are padded to whole chunks

// A token as the matrix kernels read it. Exact kernels read `values`, int8 kernels the rest. Padding is zero.
struct TokenView {
    const float* values;    // [blocks * 64]
    const int8_t* codes;    // [blocks * 64] value = code * scale of its block
    const float* scales;    // [blocks]
    const float* sums;      // [blocks] sum of the block's codes
    const int16_t* evens;   // [blocks, 2] sums of the codes of groups 0 and 2
    const int16_t* odds;    // [blocks, 2] of groups 1 and 3
};

struct TokenBuffers {  // the same, to be written
    float* values;
    int8_t* codes;
    float* scales;
    float* sums;
    int16_t* evens;
    int16_t* odds;
};

// Where a product's results go: y[token][row] = (sum + bias[row]) * weight.
struct Output {
    float* const* rows;    // [tokens]
    const float* weights;  // [tokens] or null
    fg_bias bias;
};

// Rows first..last-1 of a matrix times all tokens.
using RowsKernel = void (*)(const fg_matrix& matrix, int64_t first, int64_t last, const TokenView* tokens,
                            int64_t count, const Output& output);

// Blocks first..last-1 of a token from its values; `exact` says which of the buffers to fill.
using PrepareKernel = void (*)(const float* x, int64_t cols, int64_t first, int64_t last, bool exact,
                               const TokenBuffers& token);

// The same, from the first product `h` of an expert whose inner size is `cols`.
using ActivateKernel = void (*)(const float* h, const fg_activation& activation, int64_t cols, int64_t first,
                                int64_t last, bool exact, const TokenBuffers& token);

struct Kernels {
    const char* name;
    bool (*supported)();
    RowsKernel int8_rows[33];   // by fg_kind; null where there is none
    RowsKernel exact_rows[33];  // by fg_kind
    PrepareKernel prepare;
    ActivateKernel activate;
};

extern const Kernels kernels_portable;
#if defined(FOREGATE_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Block scales relative to a matrix's base: 2 ** (-i / 16), rounded once from double.
extern const float* const scale_table;

}  // namespace foregate
