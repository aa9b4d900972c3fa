// Compiled for AVX-512 F, BW, DQ, VL and VNNI.
#include "simd_avx512.h"
#include "table.h"

namespace foregate {

namespace {
bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
}  // namespace

constexpr Kernels kernels_avx512 = make_kernels<Avx512>("avx512vnni", supported);

}  // namespace foregate
