// Vectors of 8 floats in plain C++, for every machine. Loops of constant length: compilers turn them into the
// baseline's vector instructions (SSE2, NEON).
#pragma once

#include "half.h"
#include "kernels.h"

namespace foregate {
namespace {

struct Portable {
    static constexpr int lanes = 8;
    static constexpr int max_tile = 4;  // tokens per unpacked block
    struct Floats {
        float v[lanes];
    };

    template <class Function>
    static Floats each(Function function) {
        Floats r;
        for (int i = 0; i < lanes; i++) r.v[i] = function(i);
        return r;
    }
    static Floats zero() { return broadcast(0); }
    static Floats load(const float* p) { return each([=](int i) { return p[i]; }); }
    static void store(float* p, Floats a) {
        for (int i = 0; i < lanes; i++) p[i] = a.v[i];
    }
    static Floats broadcast(float x) { return each([=](int) { return x; }); }
    static Floats add(Floats a, Floats b) { return each([=](int i) { return a.v[i] + b.v[i]; }); }
    static Floats sub(Floats a, Floats b) { return each([=](int i) { return a.v[i] - b.v[i]; }); }
    static Floats mul(Floats a, Floats b) { return each([=](int i) { return a.v[i] * b.v[i]; }); }
    static Floats fma(Floats a, Floats b, Floats c) { return each([=](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static float reduce(Floats a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
    }

    static Floats load_bf16(const uint16_t* p) { return each([=](int i) { return from_bf16(p[i]); }); }
    static Floats load_f16(const uint16_t* p) { return each([=](int i) { return from_f16(p[i]); }); }

    // The 64 codes of a block, in order.
    struct Codes {
        uint8_t v[BLOCK];
    };

    template <int bits>
    static Codes unpack(const uint8_t* low, const uint8_t* high) {
        constexpr int width = bits == 3 ? 2 : bits, bytes = BLOCK * width / 8;
        Codes codes;
        for (int part = 0; part < BLOCK / bytes; part++)
            for (int j = 0; j < bytes; j++)
                codes.v[part * bytes + j] = static_cast<uint8_t>(low[j] >> part * width & ((1 << width) - 1));
        if constexpr (bits == 3)
            for (int j = 0; j < BLOCK; j++) codes.v[j] |= static_cast<uint8_t>((high[j / 8] >> j % 8 & 1) << 2);
        return codes;
    }

    // Multiply the codes (below 4) of every group by the group's multiplier (at most 16).
    static Codes weigh(Codes codes, const uint8_t* multipliers) {
        for (int j = 0; j < BLOCK; j++) codes.v[j] = static_cast<uint8_t>(codes.v[j] * multipliers[j / GROUP]);
        return codes;
    }

    // What `dot` takes from every code, so that products fit its arithmetic.
    template <int bits>
    static constexpr float offset = 0;

    // Partial sums of codes times the 64 int8 activations at x.
    template <int bits>
    static Floats dot(const Codes& codes, const int8_t* x) {
        int32_t sums[lanes] = {};
        for (int j = 0; j < BLOCK; j += lanes)
            for (int i = 0; i < lanes; i++) sums[i] += int16_t{codes.v[j + i]} * int16_t{x[j + i]};
        return each([&](int i) { return static_cast<float>(sums[i]); });
    }

    // No width has a faster way to weights than by `codes_at`.
    template <int bits>
    static constexpr bool looks_up = false;

    // Codes 8 * i .. 8 * i + 7 as floats.
    static Floats codes_at(const Codes& codes, int i) {
        return each([&](int j) { return static_cast<float>(codes.v[8 * i + j]); });
    }

    // For 8 blocks: a[b, 0] * b[b, 0] + a[b, 1] * b[b, 1] + the same of c and d.
    static Floats dot_pairs(const int16_t* a, const int16_t* b, const int16_t* c, const int16_t* d) {
        return each([=](int i) {
            return static_cast<float>(a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1] + c[2 * i] * d[2 * i] +
                                      c[2 * i + 1] * d[2 * i + 1]);
        });
    }

    // The scales of 16 blocks.
    static void decode_scales(const uint8_t* indices, float* scales) {
        for (int i = 0; i < CHUNK; i++) scales[i] = scale_table[indices[i]];
    }
};

}  // namespace
}  // namespace foregate
