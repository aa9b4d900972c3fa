// The products, written once for all instruction sets and kinds of matrices.
//
// Every output element is summed in one fixed order: block after block along the row, in the same lanes of the same
// accumulators. How many tokens share an unpacked block (`tile`) and how a row is cut into spans changes no rounding.
#pragma once

#include "half.h"
#include "kernels.h"

namespace foregate {
namespace {

constexpr int ROWS = 8;          // rows whose sums wait while a tile of tokens passes over a span of the weights
constexpr int PREFETCH = 2048;   // bytes ahead in the plane "low"; 8 bits with int8 stream faster without

constexpr int low_bytes(int bits) { return bits == 3 ? 16 : 8 * bits; }  // per block

// Broadcasts from memory are free, but compilers that know what was stored shuffle it out of registers instead.
inline void keep_in_memory(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Scales, multipliers and zero points of up to 16 blocks of a row. Past the end they are arbitrary but finite: tokens
// are zero there.
template <class Isa, int bits>
struct ChunkScales {
    static constexpr int per_block = bits == 2 ? BLOCK / GROUP : 1;
    static constexpr float zero_step = bits == 2 ? 1.0f / 5 : static_cast<float>(((1 << bits) - 1) / 255.0);

    alignas(64) float scale[CHUNK];
    alignas(64) uint8_t group[CHUNK * per_block];       // the plane "zeros" or "groups"
    alignas(64) uint8_t multiplier[CHUNK * per_block];  // 2 bits only, of a 16th of the scale

    // Of a block, at 2 bits of a group.
    float zero(int i) const { return (bits == 2 ? group[i] >> 4 : group[i]) * zero_step; }

    ChunkScales(const fg_matrix& m, int64_t block, int count) {
        const uint8_t *indices = m.scales + block, *zeros = m.zeros + block * per_block;
        uint8_t padded[CHUNK * (1 + per_block)] = {};
        if (count < CHUNK) {
            __builtin_memcpy(padded, indices, static_cast<size_t>(count));
            __builtin_memcpy(padded + CHUNK, zeros, static_cast<size_t>(count * per_block));
            indices = padded;
            zeros = padded + CHUNK;
        }
        Isa::decode_scales(indices, scale);
        if constexpr (bits == 2) {
            for (int i = 0; i < CHUNK; i++) scale[i] *= 1.0f / 16;
            for (int i = 0; i < CHUNK * per_block; i++) multiplier[i] = static_cast<uint8_t>((zeros[i] & 15) + 1);
        }
        __builtin_memcpy(group, zeros, sizeof group);
    }
};

// Products of a quantized matrix with int8 activations: sum over blocks of
// scale * token_scale * (sum of code * x - zero * sum of x), the inner sums in integers.
template <class Isa, int bits>
struct Int8Product {
    using F = typename Isa::Floats;
    using Scales = ChunkScales<Isa, bits>;
    static constexpr int span_blocks = 32;  // of 8 tokens: 16 KiB, half the nearest cache
    static constexpr int sums = 3;          // per token: even blocks, odd blocks (two chains hide latency), zero points

    template <int tile>
    static void span(const fg_matrix& m, int64_t row, int64_t first, int64_t last, const TokenView* tokens, F* state) {
        F sum[tile][2];
        for (int t = 0; t < tile; t++) {
            sum[t][0] = state[t * sums];
            sum[t][1] = state[t * sums + 1];
        }
        const int64_t blocks = (m.cols + BLOCK - 1) / BLOCK;
        for (int64_t chunk = first; chunk < last; chunk += CHUNK) {
            const int count = static_cast<int>(last - chunk < CHUNK ? last - chunk : CHUNK);
            const Scales scales(m, row * blocks + chunk, count);
            alignas(64) float scale[tile][CHUNK];
            zero_points<tile>(scales, chunk, tokens, scale, state + 2);
            keep_in_memory(scale);

            const uint8_t* low = static_cast<const uint8_t*>(m.data) + (row * blocks + chunk) * low_bytes(bits);
            const uint8_t* high = bits == 3 ? m.high + (row * blocks + chunk) * 8 : nullptr;
            const auto add_block = [&](int b, int parity) {
                if constexpr (tile == 1 && bits < 8) __builtin_prefetch(low + b * low_bytes(bits) + PREFETCH);
                auto codes = Isa::template unpack<bits>(low + b * low_bytes(bits), high + b * 8);
                if constexpr (bits == 2) codes = Isa::weigh(codes, scales.multiplier + 4 * b);
                for (int t = 0; t < tile; t++) {
                    const F dot = Isa::template dot<bits>(codes, tokens[t].codes + (chunk + b) * BLOCK);
                    sum[t][parity] = Isa::fma(dot, Isa::broadcast(scale[t][b]), sum[t][parity]);
                }
            };
            for (int b = 0; b + 1 < count; b += 2) {
                add_block(b, 0);
                add_block(b + 1, 1);
            }
            if (count % 2) add_block(count - 1, 0);
        }
        for (int t = 0; t < tile; t++) {
            state[t * sums] = sum[t][0];
            state[t * sums + 1] = sum[t][1];
        }
    }

    static float total(const F* sum) { return Isa::reduce(Isa::sub(Isa::add(sum[0], sum[1]), sum[2])); }

private:
    // Add what the zero points contribute to the chunk to every token's `sum`, and leave the products of the scales in
    // `scale`.
    template <int tile>
    static void zero_points(const Scales& scales, int64_t chunk, const TokenView* tokens, float (*scale)[CHUNK],
                            F* sum) {
        alignas(64) float zero[CHUNK];
        alignas(64) int16_t evens[2 * CHUNK], odds[2 * CHUNK];  // multiplier * zero of groups 0 and 2, 1 and 3
        if constexpr (bits == 2) {
            uint16_t pairs[2 * CHUNK];  // of groups, as 16-bit lanes: four times fewer shuffles than byte by byte
            __builtin_memcpy(pairs, scales.group, sizeof pairs);
            for (int i = 0; i < 2 * CHUNK; i++) {
                evens[i] = static_cast<int16_t>(((pairs[i] & 15) + 1) * (pairs[i] >> 4 & 15));
                odds[i] = static_cast<int16_t>(((pairs[i] >> 8 & 15) + 1) * (pairs[i] >> 12));
            }
        } else {
            for (int i = 0; i < CHUNK; i++) zero[i] = scales.zero(i) - Isa::template offset<bits>;
        }
        for (int t = 0; t < tile; t++) {
            const TokenView& token = tokens[t];
            for (int i = 0; i < CHUNK; i += Isa::lanes) {
                const int64_t at = chunk + i;
                const F product = Isa::mul(Isa::load(scales.scale + i), Isa::load(token.scales + at));
                Isa::store(scale[t] + i, product);
                F zeros;
                if constexpr (bits == 2)
                    zeros = Isa::mul(
                        Isa::dot_pairs(evens + 2 * i, token.evens + 2 * at, odds + 2 * i, token.odds + 2 * at),
                        Isa::broadcast(Scales::zero_step));
                else
                    zeros = Isa::mul(Isa::load(zero + i), Isa::load(token.sums + at));
                sum[t * sums] = Isa::fma(product, zeros, sum[t * sums]);
            }
        }
    }
};

// Products with float activations: sum over blocks of scale * (sum of weight * x), the weights without their scale.
template <class Isa, int kind>
struct ExactProduct {
    using F = typename Isa::Floats;
    static constexpr int span_blocks = 8;  // of 8 tokens: 16 KiB, half the nearest cache
    static constexpr int sums = 1;
    static constexpr int parts = BLOCK / Isa::lanes;
    static constexpr int per_block = kind == FG_Q2 ? BLOCK / GROUP : 1;

    template <int tile>
    static void span(const fg_matrix& m, int64_t row, int64_t first, int64_t last, const TokenView* tokens, F* state) {
        F sum[tile];
        for (int t = 0; t < tile; t++) sum[t] = state[t];
        const auto add_block = [&](const F* weights, F scale, int64_t block) {
            for (int t = 0; t < tile; t++) {
                const float* x = tokens[t].values + block * BLOCK;
                F dot = Isa::mul(weights[0], Isa::load(x));
                for (int i = 1; i < parts; i++) dot = Isa::fma(weights[i], Isa::load(x + i * Isa::lanes), dot);
                sum[t] = Isa::fma(dot, scale, sum[t]);
            }
        };
        F weights[parts];
        if constexpr (kind <= FG_Q8) {
            const int64_t blocks = (m.cols + BLOCK - 1) / BLOCK;
            for (int64_t chunk = first; chunk < last; chunk += CHUNK) {
                const int count = static_cast<int>(last - chunk < CHUNK ? last - chunk : CHUNK);
                const ChunkScales<Isa, kind> scales(m, row * blocks + chunk, count);
                alignas(64) float zeros[CHUNK * per_block], multipliers[CHUNK * per_block];
                for (int i = 0; i < CHUNK * per_block; i++) {
                    zeros[i] = scales.zero(i);
                    if constexpr (kind == FG_Q2) multipliers[i] = scales.multiplier[i];
                }
                keep_in_memory(zeros);
                keep_in_memory(multipliers);
                for (int b = 0; b < count; b++) {
                    unpack(m, row * blocks + chunk + b, zeros + b * per_block, multipliers + b * per_block, weights);
                    add_block(weights, Isa::broadcast(scales.scale[b]), chunk + b);
                }
            }
        } else {
            constexpr int size = kind == FG_F32 ? 4 : 2;
            const char* numbers = static_cast<const char*>(m.data) + row * m.cols * size;
            for (int64_t block = first; block < last; block++) {
                const char* p = numbers + block * BLOCK * size;
                alignas(64) char padded[BLOCK * size] = {};
                if (const int64_t left = m.cols - block * BLOCK; left < BLOCK)
                    p = static_cast<const char*>(__builtin_memcpy(padded, p, static_cast<size_t>(left * size)));
                for (int i = 0; i < parts; i++) weights[i] = load(p + i * Isa::lanes * size);
                add_block(weights, Isa::broadcast(1), block);
            }
        }
        for (int t = 0; t < tile; t++) state[t] = sum[t];
    }

    static float total(const F* sum) { return Isa::reduce(*sum); }

private:
    static F load(const char* p) {
        if constexpr (kind == FG_BF16) return Isa::load_bf16(reinterpret_cast<const uint16_t*>(p));
        if constexpr (kind == FG_F16) return Isa::load_f16(reinterpret_cast<const uint16_t*>(p));
        if constexpr (kind == FG_F32) return Isa::load(reinterpret_cast<const float*>(p));
    }

    // The weights of a block without their scale: code - zero, at 2 bits times the multiplier.
    static void unpack(const fg_matrix& m, int64_t block, const float* zeros, const float* multipliers, F* weights) {
        const uint8_t* low = static_cast<const uint8_t*>(m.data) + block * low_bytes(kind);
        const uint8_t* high = kind == FG_Q3 ? m.high + block * 8 : nullptr;
        __builtin_prefetch(low + PREFETCH);
        if constexpr (Isa::template looks_up<kind>) {
            Isa::template look_up<kind>(low, high, zeros, multipliers, weights);
        } else {
            const auto codes = Isa::template unpack<kind>(low, high);
            for (int i = 0; i < parts; i++) {
                const int group = kind == FG_Q2 ? i * Isa::lanes / GROUP : 0;
                weights[i] = Isa::sub(Isa::codes_at(codes, i), Isa::broadcast(zeros[group]));
                if constexpr (kind == FG_Q2) weights[i] = Isa::mul(weights[i], Isa::broadcast(multipliers[group]));
            }
        }
    }
};

inline float read_bias(const fg_bias& bias, int64_t row) {
    if (!bias.data) return 0;
    if (bias.kind == FG_F32) return static_cast<const float*>(bias.data)[row];
    const uint16_t bits = static_cast<const uint16_t*>(bias.data)[row];
    return bias.kind == FG_BF16 ? from_bf16(bits) : from_f16(bits);
}

// One tile of tokens: its rows first..last-1, at most ROWS of them, span by span, so that a span of the tokens stays
// in the nearest cache while the rows pass over it.
template <class Isa, class Product, int tile>
void rows_of_tile(const fg_matrix& m, int64_t first, int64_t last, const TokenView* tokens, const Output& y,
                  int64_t token) {
    constexpr int sums = Product::sums;
    typename Isa::Floats state[ROWS][tile * sums];
    for (int64_t row = first; row < last; row++)
        for (int i = 0; i < tile * sums; i++) state[row - first][i] = Isa::zero();

    const int64_t blocks = (m.cols + BLOCK - 1) / BLOCK;
    const int64_t span = tile == 1 ? blocks : Product::span_blocks;
    for (int64_t block = 0; block < blocks; block += span)
        for (int64_t row = first; row < last; row++)
            Product::template span<tile>(m, row, block, block + span < blocks ? block + span : blocks, tokens + token,
                                         state[row - first]);

    for (int64_t row = first; row < last; row++) {
        const float base = m.base ? *m.base : 1, bias = read_bias(y.bias, row);
        for (int t = 0; t < tile; t++) {
            const float value = Product::total(state[row - first] + t * sums) * base + bias;
            y.rows[token + t][row] = y.weights ? value * y.weights[token + t] : value;
        }
    }
}

template <class Isa, class Product>
void rows(const fg_matrix& m, int64_t first, int64_t last, const TokenView* tokens, int64_t count, const Output& y) {
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t end = row + ROWS < last ? row + ROWS : last;
        int64_t token = 0;
        if constexpr (Isa::max_tile >= 8)
            for (; token + 8 <= count; token += 8) rows_of_tile<Isa, Product, 8>(m, row, end, tokens, y, token);
        for (; token + 4 <= count; token += 4) rows_of_tile<Isa, Product, 4>(m, row, end, tokens, y, token);
        for (; token + 2 <= count; token += 2) rows_of_tile<Isa, Product, 2>(m, row, end, tokens, y, token);
        for (; token < count; token++) rows_of_tile<Isa, Product, 1>(m, row, end, tokens, y, token);
    }
}

}  // namespace
}  // namespace foregate
