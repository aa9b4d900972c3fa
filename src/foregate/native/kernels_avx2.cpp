// Compiled for AVX2, FMA and F16C.
#include "simd_avx2.h"
#include "table.h"

namespace foregate {

namespace {
bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

constexpr Kernels kernels_avx2 = make_kernels<Avx2>("avx2", supported);

}  // namespace foregate
