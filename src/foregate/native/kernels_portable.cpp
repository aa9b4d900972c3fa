// Compiled for the baseline of the machine's architecture.
#include "simd_portable.h"
#include "table.h"

namespace foregate {

namespace {

#if defined(__aarch64__)
constexpr const char* name = "neon";  // part of the baseline
#else
constexpr const char* name = "scalar";
#endif

bool supported() { return true; }

}  // namespace

constexpr Kernels kernels_portable = make_kernels<Portable>(name, supported);

}  // namespace foregate
