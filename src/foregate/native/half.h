// 16-bit floats as float32.
#pragma once

#include <cstdint>

namespace foregate {
namespace {

inline float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

inline float from_f16(uint16_t bits) {
    // With the exponent field moved over, the value is too small by 2**112, subnormal numbers included. An exponent
    // of all ones (infinity, NaN) stays all ones.
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const uint32_t finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
    const uint32_t value = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
    return __builtin_bit_cast(float, value | static_cast<uint32_t>(bits & 0x8000) << 16);
}

}  // namespace
}  // namespace foregate
