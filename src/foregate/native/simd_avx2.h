// Vectors of 8 floats on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace foregate {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    static constexpr int max_tile = 4;  // tokens per unpacked block; their sums must stay in registers
    using Floats = __m256;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static Floats broadcast(float v) { return _mm256_set1_ps(v); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce(Floats v) {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
    }

    static Floats load_bf16(const uint16_t* p) {
        const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    }
    static Floats load_f16(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

    // The 64 codes of a block, one byte each: 0..31 and 32..63.
    struct Codes {
        __m256i a, b;
    };

    template <int bits>
    static Codes unpack(const uint8_t* low, const uint8_t* high) {
        const __m256i* p = reinterpret_cast<const __m256i*>(low);
        if constexpr (bits == 8) return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
        if constexpr (bits == 4) {
            const __m256i packed = _mm256_loadu_si256(p), mask = _mm256_set1_epi8(15);
            return {_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask)};
        }
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
        const __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 2), packed), mask = _mm256_set1_epi8(3);
        Codes codes = {_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16(both, 4), mask)};
        if constexpr (bits == 3) {
            codes.a = _mm256_or_si256(codes.a, third_bits(high));
            codes.b = _mm256_or_si256(codes.b, third_bits(high + 4));
        }
        return codes;
    }

    // Multiply the codes (below 4) of every group by the group's multiplier (at most 16). Bytes cannot overflow, so
    // a product of 16-bit lanes does two at once.
    static Codes weigh(Codes codes, const uint8_t* multipliers) {
        int four;
        __builtin_memcpy(&four, multipliers, 4);
        const __m256i all = _mm256_set1_epi32(four);
        return {_mm256_mullo_epi16(codes.a, _mm256_shuffle_epi8(all, spread(0, 1))),
                _mm256_mullo_epi16(codes.b, _mm256_shuffle_epi8(all, spread(2, 3)))};
    }

    // What `dot` takes from every code, so that products fit its arithmetic.
    template <int bits>
    static constexpr float offset = bits == 8 ? 128 : 0;

    // Partial sums of codes (less the offset) times the 64 int8 activations at x.
    template <int bits>
    static Floats dot(Codes codes, const int8_t* x) {
        const __m256i* p = reinterpret_cast<const __m256i*>(x);
        const __m256i xa = _mm256_loadu_si256(p), xb = _mm256_loadu_si256(p + 1), ones = _mm256_set1_epi16(1);
        if constexpr (bits == 8) {  // |w| * (sign(w) * x), w = code - 128: pairs of codes would overflow 16 bits
            const __m256i wa = _mm256_xor_si256(codes.a, _mm256_set1_epi8(-128));
            const __m256i wb = _mm256_xor_si256(codes.b, _mm256_set1_epi8(-128));
            const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(wa), _mm256_sign_epi8(xa, wa));
            const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(wb), _mm256_sign_epi8(xb, wb));
            return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)));
        }
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes.a, xa), _mm256_maddubs_epi16(codes.b, xb));
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
    }

    // No width has a faster way to weights than by `codes_at`.
    template <int bits>
    static constexpr bool looks_up = false;

    // Codes 8 * i .. 8 * i + 7 as floats.
    static Floats codes_at(Codes codes, int i) {
        const __m256i half = i < 4 ? codes.a : codes.b;
        const __m128i quarter = i & 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(i & 1 ? _mm_srli_si128(quarter, 8) : quarter));
    }

    // For 8 blocks: a[b, 0] * b[b, 0] + a[b, 1] * b[b, 1] + the same of c and d.
    static Floats dot_pairs(const int16_t* a, const int16_t* b, const int16_t* c, const int16_t* d) {
        const auto at = [](const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
        return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(at(a), at(b)), _mm256_madd_epi16(at(c), at(d))));
    }

    // The scales of 16 blocks.
    static void decode_scales(const uint8_t* indices, float* scales) {
        for (int i = 0; i < CHUNK; i++) scales[i] = scale_table[indices[i]];
    }

private:
    // Bytes of 4 where the 32 bits at p are set.
    static __m256i third_bits(const uint8_t* p) {
        const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
        int word;
        __builtin_memcpy(&word, p, 4);
        const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), bytes), bit);
        return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(4));
    }

    // Shuffle that widens byte `first` to the 16-bit lanes of the lower half, byte `second` to those of the upper.
    static __m256i spread(int first, int second) {
        return _mm256_set_m128i(_mm_set1_epi16(static_cast<short>(0x8000 | second)),
                                _mm_set1_epi16(static_cast<short>(0x8000 | first)));
    }
};

}  // namespace
}  // namespace foregate
