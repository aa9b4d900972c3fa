// Eight float32 lanes: the quantizers work on eight blocks of a matrix at once, one per lane, so that a block's sums
// and its search need no operation across lanes. GCC and Clang compile the vector types for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#define FOREGATE_INLINE inline __attribute__((always_inline))

namespace foregate::quantize {

constexpr int lane_count = 8;

using Lanes = float __attribute__((vector_size(4 * lane_count)));
using LaneInts = std::int32_t __attribute__((vector_size(4 * lane_count)));  // also what a comparison gives

FOREGATE_INLINE Lanes splat(float x) { return Lanes{x, x, x, x, x, x, x, x}; }
FOREGATE_INLINE Lanes minimum(Lanes a, Lanes b) { return a < b ? a : b; }
FOREGATE_INLINE Lanes maximum(Lanes a, Lanes b) { return a > b ? a : b; }
FOREGATE_INLINE Lanes clamp(Lanes x, float low, float high) { return minimum(maximum(x, splat(low)), splat(high)); }
FOREGATE_INLINE Lanes absolute(Lanes x) { return maximum(x, -x); }

// Round to nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction.
FOREGATE_INLINE Lanes nearest(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

FOREGATE_INLINE bool any(LaneInts mask) {
    std::int32_t bits = 0;
    for (int lane = 0; lane < lane_count; ++lane) bits |= mask[lane];
    return bits != 0;
}

// log2 of positive normal numbers, absolute error below 1e-6: the exponent, and the series of the inverse hyperbolic
// tangent for the mantissa in [sqrt(1/2), sqrt(2)).
FOREGATE_INLINE Lanes log2_of(Lanes x) {
    LaneInts bits;
    std::memcpy(&bits, &x, sizeof bits);
    const LaneInts exponent = (bits - 0x3f3504f3) >> 23;
    bits -= exponent << 23;
    Lanes mantissa;
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    const Lanes y = (mantissa - 1.0f) / (mantissa + 1.0f);
    const Lanes y2 = y * y;
    const Lanes series = y * (2.88539008f + y2 * (0.96179669f + y2 * (0.57707802f + y2 * 0.41219858f)));
    return __builtin_convertvector(exponent, Lanes) + series;
}

// 2^x for |x| < 126, relative error below 3e-6: the integer part as an exponent, a polynomial for the rest.
FOREGATE_INLINE Lanes exp2_of(Lanes x) {
    const Lanes whole = nearest(x);
    const Lanes f = x - whole;
    const Lanes power =
        1.0f + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * 0.00133336f))));
    const LaneInts bits = (__builtin_convertvector(whole, LaneInts) + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

}  // namespace foregate::quantize
