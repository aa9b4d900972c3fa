// Vectors of 16 floats on AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace foregate {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    static constexpr int max_tile = 8;  // tokens per unpacked block; their sums must stay in registers
    using Floats = __m512;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static Floats broadcast(float v) { return _mm512_set1_ps(v); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float reduce(Floats v) { return _mm512_reduce_add_ps(v); }

    static Floats load_bf16(const uint16_t* p) {
        const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    }
    static Floats load_f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }

    // The 64 codes of a block, one byte each, in order.
    struct Codes {
        __m512i v;
    };

    template <int bits>
    static Codes unpack(const uint8_t* low, const uint8_t* high) {
        if constexpr (bits == 8) return {_mm512_loadu_si512(low)};
        if constexpr (bits == 4) {
            const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
            const __m512i packed = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
            return {_mm512_and_si512(_mm512_srlv_epi32(packed, shifts), _mm512_set1_epi8(15))};
        }
        const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
        const __m512i packed = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
        const __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(packed, shifts), _mm512_set1_epi8(3));
        if constexpr (bits == 3) {
            uint64_t third;
            __builtin_memcpy(&third, high, 8);
            return {_mm512_mask_add_epi8(codes, third, codes, _mm512_set1_epi8(4))};
        }
        return {codes};
    }

    // Multiply the codes (below 4) of every group by the group's multiplier (at most 16). Bytes cannot overflow, so
    // a product of 16-bit lanes does two at once.
    static Codes weigh(Codes codes, const uint8_t* multipliers) {
        const auto spread = [](int group) { return _mm_set1_epi16(static_cast<short>(0x8000 | group)); };
        __m512i lanes = _mm512_castsi128_si512(spread(0));
        lanes = _mm512_inserti32x4(lanes, spread(1), 1);
        lanes = _mm512_inserti32x4(lanes, spread(2), 2);
        lanes = _mm512_inserti32x4(lanes, spread(3), 3);
        int four;
        __builtin_memcpy(&four, multipliers, 4);
        return {_mm512_mullo_epi16(codes.v, _mm512_shuffle_epi8(_mm512_set1_epi32(four), lanes))};
    }

    // What `dot` takes from every code, so that products fit its arithmetic.
    template <int bits>
    static constexpr float offset = 0;

    // Partial sums of codes times the 64 int8 activations at x.
    template <int bits>
    static Floats dot(Codes codes, const int8_t* x) {
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.v, _mm512_loadu_si512(x)));
    }

    // Codes 16 * i .. 16 * i + 15 as floats.
    static Floats codes_at(Codes codes, int i) {
        const __m128i quarter = i == 0   ? _mm512_castsi512_si128(codes.v)
                                : i == 1 ? _mm512_extracti32x4_epi32(codes.v, 1)
                                : i == 2 ? _mm512_extracti32x4_epi32(codes.v, 2)
                                         : _mm512_extracti32x4_epi32(codes.v, 3);
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(quarter));
    }

    // Whether `look_up` knows the width.
    template <int bits>
    static constexpr bool looks_up = bits < 8;

    // The 64 weights of a block, code - zero, at 2 bits times the group's multiplier: picked from a register that holds
    // the value of every code.
    template <int bits>
    static void look_up(const uint8_t* low, const uint8_t* high, const float* zeros, const float* multipliers,
                        Floats* weights) {
        if constexpr (bits == 4) {
            const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512 values = _mm512_sub_ps(codes, _mm512_set1_ps(*zeros));
            for (int i = 0; i < 2; i++) {  // an index counts by its low four bits
                const __m512i packed = widen(low + 16 * i);
                weights[i] = _mm512_permutexvar_ps(packed, values);
                weights[i + 2] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), values);
            }
            return;
        }
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        const __m512i packed = widen(low);
        const auto pick = [&](__m512 values, int i) {  // an index counts by its low two bits
            return _mm512_permutevar_ps(values, _mm512_srli_epi32(packed, static_cast<unsigned>(2 * i)));
        };
        for (int i = 0; i < 4; i++) {
            if constexpr (bits == 2) {
                const __m512 shifted = _mm512_sub_ps(codes, _mm512_set1_ps(zeros[i]));
                weights[i] = pick(_mm512_mul_ps(shifted, _mm512_set1_ps(multipliers[i])), i);
            } else {
                const __m512 zero = _mm512_set1_ps(*zeros), upper = _mm512_add_ps(codes, _mm512_set1_ps(4));
                uint16_t third;
                __builtin_memcpy(&third, high + 2 * i, 2);
                weights[i] = _mm512_mask_blend_ps(third, pick(_mm512_sub_ps(codes, zero), i),
                                                  pick(_mm512_sub_ps(upper, zero), i));
            }
        }
    }

    // For 16 blocks: a[b, 0] * b[b, 0] + a[b, 1] * b[b, 1] + the same of c and d.
    static Floats dot_pairs(const int16_t* a, const int16_t* b, const int16_t* c, const int16_t* d) {
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_madd_epi16(_mm512_loadu_si512(a), _mm512_loadu_si512(b)),
                                                   _mm512_madd_epi16(_mm512_loadu_si512(c), _mm512_loadu_si512(d))));
    }

    // The scales of 16 blocks: 2 ** (-i / 16) is one of 16 values, exactly halved i / 16 times.
    static void decode_scales(const uint8_t* indices, float* scales) {
        const __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(indices)));
        const __m512i halvings = _mm512_srli_epi32(i, 4);
        const __m512 mantissa = _mm512_permutexvar_ps(i, _mm512_loadu_ps(scale_table));  // by the low four bits of i
        const __m512i exponent = _mm512_slli_epi32(halvings, 23);
        store(scales, _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(mantissa), exponent)));
    }

private:
    // 16 bytes as 32-bit lanes.
    static __m512i widen(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};

}  // namespace
}  // namespace foregate
