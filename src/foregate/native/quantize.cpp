// The quantizers' C interface: a float32 matrix to the planes of the quantized format. Eight blocks at a time are laid
// out one per lane, quantized and packed; blocks do not depend on one another, so threads do not change the bytes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <vector>

#include "foregate.h"
#include "quantize_block.hpp"
#include "runtime.h"

namespace foregate::quantize {
namespace {

constexpr std::int64_t tiles_per_task = 32;

struct Matrix {
    const float* weight;      // [rows, cols]
    const float* importance;  // [cols] or null: all alike
    std::int64_t rows, cols;
    std::int64_t row_blocks = (cols + block_size - 1) / block_size;
    std::int64_t blocks = rows * row_blocks;
    std::int64_t tiles = (blocks + lane_count - 1) / lane_count;

    // Columns that block `block` has; fewer than 64 at the end of a row, none past the last row.
    std::int64_t width(std::int64_t block) const {
        if (block >= blocks) return 0;
        return std::min<std::int64_t>(block_size, cols - block % row_blocks * block_size);
    }
};

struct Planes {
    std::uint8_t *low, *high, *scales, *zeros;
};

// Weighted sums of squares, of a matrix and of what is stored for it.
struct Squares {
    double given = 0, stored = 0;
};

FOREGATE_INLINE void load(const Matrix& matrix, std::int64_t first, Tile& tile) {
    for (int lane = 0; lane < lane_count; ++lane) {
        const std::int64_t block = first + lane, width = matrix.width(block);
        const std::int64_t column = block % matrix.row_blocks * block_size;
        const std::int64_t start = block / matrix.row_blocks * matrix.cols + column;
        for (int j = 0; j < width; ++j) {
            tile.w[j][lane] = matrix.weight[start + j];
            tile.h[j][lane] = matrix.importance ? matrix.importance[column + j] : 1.0f;
        }
        for (int j = static_cast<int>(width); j < block_size; ++j) tile.w[j][lane] = tile.h[j][lane] = 0;
    }
}

// The 64 codes of a block into its bytes of the planes "low" and "high".
template <int Bits>
FOREGATE_INLINE void pack(const std::uint8_t* codes, std::int64_t block, const Planes& planes) {
    if constexpr (Bits == 8) {
        std::memcpy(planes.low + block * 64, codes, 64);
    } else if constexpr (Bits == 4) {
        std::uint8_t* low = planes.low + block * 32;
        for (int j = 0; j < 32; ++j) low[j] = static_cast<std::uint8_t>(codes[j] | codes[j + 32] << 4);
    } else {
        std::uint8_t* low = planes.low + block * 16;
        for (int j = 0; j < 16; ++j)
            low[j] = static_cast<std::uint8_t>((codes[j] & 3) | (codes[j + 16] & 3) << 2 | (codes[j + 32] & 3) << 4 |
                                               (codes[j + 48] & 3) << 6);
    }
    if constexpr (Bits == 3) {
        std::uint8_t* high = planes.high + block * 8;
        for (int byte = 0; byte < 8; ++byte) {
            int bits = 0;
            for (int j = 0; j < 8; ++j) bits |= codes[8 * byte + j] >> 2 << j;
            high[byte] = static_cast<std::uint8_t>(bits);
        }
    }
}

template <int Bits>
FOREGATE_INLINE void store(const Matrix& matrix, const Tile& tile, const Format& format, const Choice& choice,
                           std::int64_t first, const Planes& planes, Squares& squares) {
    using Its = Layout<Bits>;
    LaneInts codes[block_size];
    Lanes given = splat(0), stored = splat(0);
    const Lanes scale = format.block_scale(choice.index);
    for (int g = 0; g < Its::groups; ++g) {
        const Fit fit = Its::restore(scale, choice.factor[g], choice.zero[g]);
        const Lanes inverse = 1.0f / fit.scale;
        for (int j = g * Its::size; j < (g + 1) * Its::size; ++j) {
            const Lanes q = code_of(tile.w[j], inverse, fit.zero, Its::top);
            const Lanes restored = (q - fit.zero) * fit.scale;
            codes[j] = __builtin_convertvector(q, LaneInts);
            given += tile.h[j] * tile.w[j] * tile.w[j];
            stored += tile.h[j] * restored * restored;
        }
    }
    for (int lane = 0; lane < lane_count; ++lane) {
        squares.given += given[lane];
        squares.stored += stored[lane];
    }
    for (int lane = 0; lane < lane_count && first + lane < matrix.blocks; ++lane) {
        const std::int64_t block = first + lane, width = matrix.width(block);
        std::uint8_t bytes[block_size] = {};
        for (int j = 0; j < width; ++j) bytes[j] = static_cast<std::uint8_t>(codes[j][lane]);
        pack<Bits>(bytes, block, planes);
        planes.scales[block] = static_cast<std::uint8_t>(choice.index[lane]);
        for (int g = 0; g < Its::groups; ++g) {
            const int zero = static_cast<int>(choice.zero[g][lane]);
            const int factor = static_cast<int>(choice.factor[g][lane]);
            const int byte = Bits == 2 ? zero << 4 | (factor - 1) : zero;
            planes.zeros[block * Its::groups + g] = static_cast<std::uint8_t>(byte);
        }
    }
}

template <int Bits, Method method>
FOREGATE_INLINE Squares quantize_tiles(const Matrix& matrix, const Format& format, const Planes& planes,
                                       std::int64_t first, std::int64_t last) {
    Tile tile;
    Squares squares;
    for (std::int64_t i = first; i < last; ++i) {
        load(matrix, i * lane_count, tile);
        store<Bits>(matrix, tile, format, choose<Bits, method>(tile, format), i * lane_count, planes, squares);
    }
    return squares;
}

// The greatest full-range scale of the tiles' groups.
template <int Bits>
FOREGATE_INLINE float greatest_scale(const Matrix& matrix, std::int64_t first, std::int64_t last) {
    using Its = Layout<Bits>;
    Tile tile;
    Lanes greatest = splat(0);
    for (std::int64_t i = first; i < last; ++i) {
        load(matrix, i * lane_count, tile);
        for (int g = 0; g < Its::groups; ++g) {
            const Group group = make_group<Its::size>(tile.w + g * Its::size, tile.h + g * Its::size);
            greatest = maximum(greatest, (group.high - group.low) / Its::top);
        }
    }
    float values[lane_count];
    std::memcpy(values, &greatest, sizeof values);
    return *std::max_element(values, values + lane_count);
}

using QuantizeTiles = Squares (*)(const Matrix&, const Format&, const Planes&, std::int64_t first, std::int64_t last);
using GreatestScale = float (*)(const Matrix&, std::int64_t first, std::int64_t last);

// The same code for each instruction set: what is inlined into a function is compiled for that function's target.
#if defined(__x86_64__)
#define FOREGATE_AVX2 __attribute__((target("avx2")))
#else
#define FOREGATE_AVX2
#endif

template <int Bits, Method method>
struct Compiled {
    static Squares portable(const Matrix& m, const Format& f, const Planes& p, std::int64_t first, std::int64_t last) {
        return quantize_tiles<Bits, method>(m, f, p, first, last);
    }
    FOREGATE_AVX2 static Squares avx2(const Matrix& m, const Format& f, const Planes& p, std::int64_t first,
                                      std::int64_t last) {
        return quantize_tiles<Bits, method>(m, f, p, first, last);
    }
};

template <int Bits>
struct CompiledScale {
    static float portable(const Matrix& m, std::int64_t first, std::int64_t last) {
        return greatest_scale<Bits>(m, first, last);
    }
    FOREGATE_AVX2 static float avx2(const Matrix& m, std::int64_t first, std::int64_t last) {
        return greatest_scale<Bits>(m, first, last);
    }
};

bool use_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

template <int Bits>
QuantizeTiles for_method(Method method) {
    switch (method) {
#define FOREGATE_CASE(name) \
    case Method::name:      \
        return use_avx2() ? Compiled<Bits, Method::name>::avx2 : Compiled<Bits, Method::name>::portable;
        FOREGATE_CASE(rtn)
        FOREGATE_CASE(hqq)
        FOREGATE_CASE(refit)
#undef FOREGATE_CASE
    }
    return nullptr;
}

QuantizeTiles quantizer_of(int bits, Method method) {
    switch (bits) {
        case 2: return for_method<2>(method);
        case 3: return for_method<3>(method);
        case 4: return for_method<4>(method);
        case 8: return for_method<8>(method);
        default: return nullptr;
    }
}

template <int Bits>
GreatestScale scale_for() {
    return use_avx2() ? CompiledScale<Bits>::avx2 : CompiledScale<Bits>::portable;
}

GreatestScale scale_of(int bits) {
    switch (bits) {
        case 2: return scale_for<2>();
        case 3: return scale_for<3>();
        case 4: return scale_for<4>();
        case 8: return scale_for<8>();
        default: return nullptr;
    }
}

std::int64_t tasks_of(const Matrix& matrix) { return (matrix.tiles + tiles_per_task - 1) / tiles_per_task; }

// work(first, last) for all tiles of a matrix, in tasks, on the runtime's threads. False when they cannot be had.
template <class Work>
bool for_tiles(const Matrix& matrix, const Work& work) {
    try {
        Runtime& shared = runtime();
        const std::lock_guard lock(shared.mutex);
        if (!shared.pool) shared.pool = std::make_unique<Pool>(shared.threads);
        shared.pool->run({{tasks_of(matrix), [&](std::int64_t task) {
            work(task * tiles_per_task, std::min(matrix.tiles, (task + 1) * tiles_per_task));
        }}});
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

HalfQuadratic half_quadratic_schedule() {
    HalfQuadratic schedule;
    double beta = 10;
    for (int i = 0; i < HalfQuadratic::iterations; ++i, beta *= 1.01) {
        schedule.beta[i] = static_cast<float>(beta);
        schedule.threshold[i] = static_cast<float>(std::pow(beta, -1 / (2 - HalfQuadratic::p)));
    }
    return schedule;
}

}  // namespace
}  // namespace foregate::quantize

using namespace foregate::quantize;

// The greatest full-range scale of a group of weight [rows, cols]: what `base` should be. NaN for bits that do not
// exist and without threads.
extern "C" FG_API float fg_quantize_base(const float* weight, std::int64_t rows, std::int64_t cols, std::int32_t bits) {
    const GreatestScale greatest_of = scale_of(bits);
    if (!greatest_of) return NAN;
    const Matrix matrix{weight, nullptr, rows, cols};
    std::atomic<float> greatest{0};
    const bool done = for_tiles(matrix, [&](std::int64_t first, std::int64_t last) {
        const float found = greatest_of(matrix, first, last);
        float known = greatest.load();
        while (found > known && !greatest.compare_exchange_weak(known, found)) {
        }
    });
    return done ? greatest.load() : NAN;
}

// Quantize weight [rows, cols] (finite) into planes of the format, given base > 0 and the table [256] of block scales.
// method: 0 rtn, 1 hqq, 2 refit. importance [cols] (positive) or null; `high` is used at 3 bits alone; `zeros` takes
// the plane "zeros" or "groups"; `squares` [2] the sums of importance * w^2 over the weights given and those stored.
// Returns 0, or 1 for bits or a method that do not exist and without threads.
extern "C" FG_API int fg_quantize(const float* weight, std::int64_t rows, std::int64_t cols, std::int32_t bits,
                                  std::int32_t method, const float* importance, const float* table, float base,
                                  std::uint8_t* low, std::uint8_t* high, std::uint8_t* scales, std::uint8_t* zeros,
                                  double* squares) {
    const QuantizeTiles quantize_some = quantizer_of(bits, static_cast<Method>(method));
    if (!quantize_some) return 1;
    const Matrix matrix{weight, importance, rows, cols};
    const Planes planes{low, high, scales, zeros};
    const Format format{table, -1 / std::log2(table[1]), base, half_quadratic_schedule()};
    std::vector<Squares> parts(static_cast<std::size_t>(tasks_of(matrix)));  // added in order: threads change nothing
    const bool done = for_tiles(matrix, [&](std::int64_t first, std::int64_t last) {
        parts[static_cast<std::size_t>(first / tiles_per_task)] = quantize_some(matrix, format, planes, first, last);
    });
    squares[0] = squares[1] = 0;
    for (const Squares& part : parts) {
        squares[0] += part.given;
        squares[1] += part.stored;
    }
    return done ? 0 : 1;
}
