// From numbers to the form in which the matrix kernels read a token, block by block, and the activations of experts.
//
// Loops run over whole blocks, so that every number goes through the same instructions wherever it stands; compilers
// turn them into vector instructions.
#pragma once

#include "kernels.h"

namespace foregate {
namespace {

constexpr float MAGIC = 0x1.8p23f;  // adding it rounds a small number to an integer, to nearest even

// e**x to 2e-7 relative, by Cody and Waite's reduction and Cephes' polynomial; saturates at the ends.
inline float exp_approx(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    const float shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float power = __builtin_bit_cast(float, (__builtin_bit_cast(int32_t, shifted) + 127) << 23);
    return (p * r * r + r + 1) * power;
}

inline float sigmoid(float x) { return 1 / (1 + exp_approx(-x)); }

// erf to 1.5e-7, Abramowitz and Stegun 7.1.26.
inline float erf_approx(float x) {
    const float a = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float y = 1 - p * t * exp_approx(-a * a);
    return x < 0 ? -y : y;
}

template <int function>
inline float apply(float x, float alpha) {
    if constexpr (function == FG_SILU) return x * sigmoid(alpha * x);
    if constexpr (function == FG_GELU_TANH)  // 0.5 * (1 + tanh(u)) = sigmoid(2u)
        return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    if constexpr (function == FG_GELU_ERF) return 0.5f * x * (1 + erf_approx(x * 0.70710678119f));
    const float positive = x < 0 ? 0 : x;
    return function == FG_RELU2 ? positive * positive : positive;
}

// One block of a token, its values given (zero past the end of the row).
inline void store_block(const float* x, int64_t block, bool exact, const TokenBuffers& token) {
    if (exact) {
        __builtin_memcpy(token.values + block * BLOCK, x, BLOCK * sizeof(float));
        return;
    }
    int32_t largest = 0;  // of the absolute values, compared as bits: NaN counts as more than infinity
    for (int i = 0; i < BLOCK; i++) {
        const int32_t bits = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    const float absmax = __builtin_bit_cast(float, largest);
    const bool finite = largest < 0x7f800000;
    const bool zero = absmax < 1e-30f;  // 127 / absmax must not overflow
    const float inverse = zero || !finite ? 0 : 127 / absmax;

    int32_t codes[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const float rounded = (finite ? x[i] : 0) * inverse + MAGIC;
        codes[i] = __builtin_bit_cast(int32_t, rounded) - __builtin_bit_cast(int32_t, MAGIC);
    }
    int32_t group[BLOCK / GROUP] = {};
    for (int i = 0; i < BLOCK; i++) group[i / GROUP] += codes[i];
    for (int i = 0; i < BLOCK; i++) token.codes[block * BLOCK + i] = static_cast<int8_t>(codes[i]);
    token.scales[block] = zero ? 0 : finite ? absmax / 127 : __builtin_nanf("");  // NaN: the result must show it
    token.sums[block] = static_cast<float>(group[0] + group[1] + group[2] + group[3]);
    for (int i = 0; i < 2; i++) {
        token.evens[2 * block + i] = static_cast<int16_t>(group[2 * i]);
        token.odds[2 * block + i] = static_cast<int16_t>(group[2 * i + 1]);
    }
}

inline void prepare(const float* x, int64_t cols, int64_t first, int64_t last, bool exact, const TokenBuffers& token) {
    for (int64_t block = first; block < last; block++) {
        float padded[BLOCK] = {};
        const float* p = x + block * BLOCK;
        if (const int64_t left = cols - block * BLOCK; left < BLOCK)
            p = static_cast<const float*>(__builtin_memcpy(padded, p, static_cast<size_t>(left) * sizeof(float)));
        store_block(p, block, exact, token);
    }
}

// The gate and up parts of a block, zero past the end of the row.
inline void split_block(const float* h, int layout, int64_t cols, int64_t start, float* gate, float* up) {
    const int64_t count = cols - start < BLOCK ? cols - start : BLOCK;
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    if (layout == FG_INTERLEAVED) {
        for (int64_t i = 0; i < count; i++) gate[i] = h[2 * (start + i)];
        for (int64_t i = 0; i < count; i++) up[i] = h[2 * (start + i) + 1];
    } else {
        __builtin_memcpy(gate, h + start, bytes);
        if (layout == FG_CONCATENATED) __builtin_memcpy(up, h + cols + start, bytes);
    }
}

template <int function>
void activate_with(const float* h, const fg_activation& a, int64_t cols, int64_t first, int64_t last, bool exact,
                   const TokenBuffers& token) {
    for (int64_t block = first; block < last; block++) {
        float gate[BLOCK] = {}, up[BLOCK] = {};
        split_block(h, a.layout, cols, block * BLOCK, gate, up);
        if (a.layout == FG_UNGATED) {
            for (int i = 0; i < BLOCK; i++) gate[i] = apply<function>(gate[i], a.alpha);
        } else {
            for (int i = 0; i < BLOCK; i++) {
                const float g = gate[i] > a.limit ? a.limit : gate[i];
                float u = up[i] > a.limit ? a.limit : up[i];
                u = u < -a.limit ? -a.limit : u;
                gate[i] = apply<function>(g, a.alpha) * (u + a.up_offset);
            }
        }
        store_block(gate, block, exact, token);
    }
}

inline void activate(const float* h, const fg_activation& a, int64_t cols, int64_t first, int64_t last, bool exact,
                     const TokenBuffers& token) {
    switch (a.function) {
        case FG_SILU: return activate_with<FG_SILU>(h, a, cols, first, last, exact, token);
        case FG_GELU_TANH: return activate_with<FG_GELU_TANH>(h, a, cols, first, last, exact, token);
        case FG_GELU_ERF: return activate_with<FG_GELU_ERF>(h, a, cols, first, last, exact, token);
        case FG_RELU2: return activate_with<FG_RELU2>(h, a, cols, first, last, exact, token);
        case FG_RELU: return activate_with<FG_RELU>(h, a, cols, first, last, exact, token);
    }
}

}  // namespace
}  // namespace foregate
