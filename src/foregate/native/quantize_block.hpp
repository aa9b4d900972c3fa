// Choosing what the format stores for a block of 64 weights in each lane: the index of the block's scale and, for each
// of its groups, a zero point and at 2 bits a multiplier. Every candidate is judged by the error of the stored values.
#pragma once

#include "quantize_fit.hpp"

namespace foregate::quantize {

constexpr int block_size = 64;
constexpr int max_groups = 4;

enum class Method { rtn = 0, hqq = 1, refit = 2 };

struct Tile {  // eight blocks, one per lane; padding has weight 0 and importance 0
    Lanes w[block_size];
    Lanes h[block_size];
};

struct Format {
    const float* table;     // [256] block scales relative to base, falling
    float steps;            // indices per factor of two
    float base;
    HalfQuadratic schedule;

    FOREGATE_INLINE Lanes block_scale(Lanes index) const {
        Lanes scale;
        for (int lane = 0; lane < lane_count; ++lane) scale[lane] = base * table[static_cast<int>(index[lane])];
        return scale;
    }
    FOREGATE_INLINE Lanes index_of(Lanes scale) const { return nearest(clamp(steps * log2_of(base / scale), 0, 255)); }
};

// What differs between the 2-bit layout (four groups of 16) and the others (one group of 64).
template <int Bits>
struct Layout {
    static constexpr int groups = Bits == 2 ? 4 : 1;
    static constexpr int size = block_size / groups;
    static constexpr float top = (1 << Bits) - 1;
    static constexpr float zero_top = Bits == 2 ? 15.0f : 255.0f;       // stored zero points: 0..zero_top
    static constexpr float zero_step = Bits == 2 ? 1.0f / 5 : top / 255;

    static FOREGATE_INLINE Lanes stored_zero(Lanes zero) { return nearest(clamp(zero * (1 / zero_step), 0, zero_top)); }
    static FOREGATE_INLINE Lanes stored_factor(Lanes scale, Lanes block_scale) {
        return Bits == 2 ? nearest(clamp(16.0f * scale / block_scale, 1, 16)) : splat(16);
    }
    static FOREGATE_INLINE Fit restore(Lanes block_scale, Lanes factor, Lanes zero) {
        return {Bits == 2 ? block_scale * factor * (1.0f / 16) : block_scale, zero * zero_step};
    }
};

struct Choice {
    Lanes index;
    Lanes factor[max_groups];  // m in 1..16 at 2 bits, else 16
    Lanes zero[max_groups];    // t
};

// A search keeps, lane by lane, the choice of least error.
template <int Bits>
struct Search {
    using Its = Layout<Bits>;
    const Format& format;
    Group groups[Its::groups];
    Lanes least;  // the least scale that can be stored

    FOREGATE_INLINE Search(const Tile& tile, const Format& format)
        : format(format), least(splat(format.base * format.table[255] * (Bits == 2 ? 1.0f / 16 : 1.0f))) {
        for (int g = 0; g < Its::groups; ++g)
            groups[g] = make_group<Its::size>(tile.w + g * Its::size, tile.h + g * Its::size);
    }

    // The nearest stored values; the block's scale is that of the group with the greatest.
    FOREGATE_INLINE Choice snap(const Fit* fits) const {
        Lanes greatest = fits[0].scale;
        for (int g = 1; g < Its::groups; ++g) greatest = maximum(greatest, fits[g].scale);
        Choice choice{};
        choice.index = format.index_of(greatest);
        const Lanes scale = format.block_scale(choice.index);
        for (int g = 0; g < Its::groups; ++g) {
            choice.factor[g] = Its::stored_factor(fits[g].scale, scale);
            choice.zero[g] = Its::stored_zero(fits[g].zero);
        }
        return choice;
    }

    FOREGATE_INLINE Lanes group_error(int g, Lanes block_scale, Lanes factor, Lanes zero) const {
        return squared_error<Its::size>(groups[g], Its::restore(block_scale, factor, zero), Its::top);
    }

    FOREGATE_INLINE Lanes error(const Choice& choice) const {
        const Lanes scale = format.block_scale(choice.index);
        Lanes sum = splat(0);
        for (int g = 0; g < Its::groups; ++g) sum += group_error(g, scale, choice.factor[g], choice.zero[g]);
        return sum;
    }
};

FOREGATE_INLINE void keep(LaneInts better, Choice& best, const Choice& other, int groups) {
    best.index = better ? other.index : best.index;
    for (int g = 0; g < groups; ++g) {
        best.factor[g] = better ? other.factor[g] : best.factor[g];
        best.zero[g] = better ? other.zero[g] : best.zero[g];
    }
}

constexpr int refits = 2;  // least-squares steps from each clipped range

// One group of 64 (3, 4, 8 bits): from each clipped range to its least-squares fit, snapped; then the neighbourhood of
// the best, since the error jumps as weights change codes and the snapped optimum lies beside the snap of the optimum.
template <int Bits>
FOREGATE_INLINE void refine_wide(const Search<Bits>& search, Choice& best) {
    using Its = Layout<Bits>;
    const Format& format = search.format;
    const Group& group = search.groups[0];
    Lanes best_error = search.error(best);
    Choice trial = best;
    const auto consider = [&]() __attribute__((always_inline)) {
        const Lanes error = search.error(trial);
        const LaneInts better = error < best_error;
        best_error = better ? error : best_error;
        keep(better, best, trial, 1);
    };
    for (float ratio : {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f}) {
        Fit fit = clipped_range(group, ratio, search.least, Its::top);
        for (int i = 0; i < refits; ++i) fit = least_squares<Its::size>(group, fit, search.least, Its::top);
        trial = search.snap(&fit);
        consider();
    }
    const Choice centre = best;
    const Lanes centre_scale = format.block_scale(centre.index);
    for (int step = -1; step <= 1; ++step) {
        trial.index = clamp(centre.index + static_cast<float>(step), 0, 255);
        const Lanes scale = format.block_scale(trial.index);
        const Lanes zero = nearest(centre.zero[0] * centre_scale / scale);  // keeps the offset scale * zero
        for (int shift = -4; shift <= 4; shift += 2) {
            trial.zero[0] = clamp(zero + static_cast<float>(shift), 0, Its::zero_top);
            consider();
        }
    }
    const Choice last = best;
    const Lanes last_scale = format.block_scale(last.index);
    for (int step = -1; step <= 1; ++step) {
        trial.index = clamp(last.index + static_cast<float>(step), 0, 255);
        const Lanes scale = format.block_scale(trial.index);
        const Lanes zero = minimum(last.zero[0] * Its::zero_step * last_scale / scale, splat(Its::top));
        trial.zero[0] = Its::stored_zero(best_zero<Its::size>(group, {scale, zero}, Its::top));
        consider();
    }
}

// Four groups of 16 (2 bits): the ideal fit of each group, then block scales around the greatest of them, each with the
// best multiplier and zero point that every group finds beside its ideal.
template <int Bits>
FOREGATE_INLINE void refine_grouped(const Search<Bits>& search, Choice& best) {
    using Its = Layout<Bits>;
    const Format& format = search.format;
    Fit ideal[Its::groups] = {};
    for (int g = 0; g < Its::groups; ++g) {
        const Group& group = search.groups[g];
        Lanes least_error = splat(3e38f);
        for (float ratio : {1.0f, 0.87f, 0.74f, 0.61f}) {
            Fit fit = clipped_range(group, ratio, search.least, Its::top);
            for (int i = 0; i < refits; ++i) fit = least_squares<Its::size>(group, fit, search.least, Its::top);
            const Lanes error = squared_error<Its::size>(group, fit, Its::top);
            const LaneInts better = error < least_error;
            least_error = better ? error : least_error;
            ideal[g] = {better ? fit.scale : ideal[g].scale, better ? fit.zero : ideal[g].zero};
        }
    }
    Lanes best_error = search.error(best);
    const Lanes centre = search.snap(ideal).index;
    for (int step = 1; step >= -5; step -= 2) {
        Choice trial{};
        trial.index = clamp(centre + static_cast<float>(step), 0, 255);
        const Lanes scale = format.block_scale(trial.index);
        Lanes total = splat(0);
        for (int g = 0; g < Its::groups; ++g) {
            const Lanes nearest_factor = Its::stored_factor(ideal[g].scale, scale);
            const Lanes offset = ideal[g].scale * ideal[g].zero;
            Lanes least_error = splat(3e38f);
            for (int more = -1; more <= 1; ++more) {
                const Lanes factor = clamp(nearest_factor + static_cast<float>(more), 1, 16);
                Fit fit = Its::restore(scale, factor, splat(0));
                fit.zero = minimum(offset / fit.scale, splat(Its::top));
                const Lanes middle = Its::stored_zero(best_zero<Its::size>(search.groups[g], fit, Its::top));
                for (int shift = -1; shift <= 1; ++shift) {
                    const Lanes zero = clamp(middle + static_cast<float>(shift), 0, Its::zero_top);
                    const Lanes error = search.group_error(g, scale, factor, zero);
                    const LaneInts better = error < least_error;
                    least_error = better ? error : least_error;
                    trial.factor[g] = better ? factor : trial.factor[g];
                    trial.zero[g] = better ? zero : trial.zero[g];
                }
            }
            total += least_error;
        }
        const LaneInts better = total < best_error;
        best_error = better ? total : best_error;
        keep(better, best, trial, Its::groups);
    }
}

template <int Bits, Method method>
FOREGATE_INLINE Choice choose(const Tile& tile, const Format& format) {
    using Its = Layout<Bits>;
    const Search<Bits> search(tile, format);
    Fit fits[Its::groups];
    for (int g = 0; g < Its::groups; ++g) {
        if constexpr (method == Method::hqq)
            fits[g] = half_quadratic<Its::size>(search.groups[g], format.schedule, search.least, Its::top);
        else
            fits[g] = full_range(search.groups[g], search.least, Its::top);
    }
    Choice choice = search.snap(fits);
    if constexpr (method == Method::refit) {
        if constexpr (Bits == 2)
            refine_grouped(search, choice);
        else
            refine_wide(search, choice);
    }
    return choice;
}

}  // namespace foregate::quantize
