// Fitting a scale and a zero point to one group of weights in each lane: w is stored as scale * (q - zero) with
// q in 0..top. Size is the group's number of weights; the importance h of a weight multiplies its squared error.
#pragma once

#include "quantize_lanes.hpp"

namespace foregate::quantize {

struct Fit {
    Lanes scale;
    Lanes zero;
};

struct Group {
    const Lanes* w;
    const Lanes* h;
    Lanes low;     // the least weight, at most 0: the format's zero points lie in 0..top
    Lanes high;    // the greatest weight, at least 0
    Lanes sum_h;   // kept above 0, so that padding alone divides cleanly
    Lanes sum_hw;
};

template <int Size>
FOREGATE_INLINE Group make_group(const Lanes* w, const Lanes* h) {
    Group group{w, h, splat(0), splat(0), splat(1e-20f), splat(0)};
    for (int j = 0; j < Size; ++j) {
        group.low = minimum(group.low, w[j]);
        group.high = maximum(group.high, w[j]);
        group.sum_h += h[j];
        group.sum_hw += h[j] * w[j];
    }
    return group;
}

FOREGATE_INLINE Lanes code_of(Lanes w, Lanes inverse_scale, Lanes zero, float top) {
    return nearest(clamp(w * inverse_scale + zero, 0, top));
}

// The sum of h * (w - scale * (q - zero))^2.
template <int Size>
FOREGATE_INLINE Lanes squared_error(const Group& group, Fit fit, float top) {
    const Lanes inverse = 1.0f / fit.scale;
    Lanes error = splat(0);
    for (int j = 0; j < Size; ++j) {
        const Lanes d = group.w[j] - (code_of(group.w[j], inverse, fit.zero, top) - fit.zero) * fit.scale;
        error += group.h[j] * d * d;
    }
    return error;
}

// The scale and zero point of least error for the codes that `fit` gives (linear regression of w on q). A lane whose
// codes are all equal, or whose scale would fall below `least`, keeps its fit.
template <int Size>
FOREGATE_INLINE Fit least_squares(const Group& group, Fit fit, Lanes least, float top) {
    const Lanes inverse = 1.0f / fit.scale;
    Lanes sum_hq = splat(0), sum_hqq = splat(0), sum_hqw = splat(0);
    for (int j = 0; j < Size; ++j) {
        const Lanes q = code_of(group.w[j], inverse, fit.zero, top);
        const Lanes hq = group.h[j] * q;
        sum_hq += hq;
        sum_hqq += hq * q;
        sum_hqw += hq * group.w[j];
    }
    const Lanes spread = group.sum_h * sum_hqq - sum_hq * sum_hq;
    const Lanes scale = (group.sum_h * sum_hqw - sum_hq * group.sum_hw) / spread;
    const Lanes zero = (scale * sum_hq - group.sum_hw) / (group.sum_h * scale);
    const LaneInts use = (spread > 1e-6f * group.sum_h * group.sum_h) & (scale > least);
    return {use ? scale : fit.scale, use ? clamp(zero, 0, top) : fit.zero};
}

// The zero point of least error for the codes that `fit` gives and its scale.
template <int Size>
FOREGATE_INLINE Lanes best_zero(const Group& group, Fit fit, float top) {
    const Lanes inverse = 1.0f / fit.scale;
    Lanes sum = splat(0);
    for (int j = 0; j < Size; ++j) {
        const Lanes x = group.w[j] * inverse;
        sum += group.h[j] * (nearest(clamp(x + fit.zero, 0, top)) - x);
    }
    return clamp(sum / group.sum_h, 0, top);
}

// The least and the greatest weight become the codes 0 and top.
FOREGATE_INLINE Fit full_range(const Group& group, Lanes least, float top) {
    const Lanes scale = maximum((group.high - group.low) / top, least);
    return {scale, clamp(-group.low / scale, 0, top)};
}

// The full range shrunk around its centre to `ratio` of its width: the outermost weights are clipped.
FOREGATE_INLINE Fit clipped_range(const Group& group, float ratio, Lanes least, float top) {
    const Lanes centre = 0.5f * (group.low + group.high);
    const Lanes scale = maximum((group.high - group.low) * (ratio / top), least);
    return {scale, clamp(-(centre + (group.low - centre) * ratio) / scale, 0, top)};
}

// Half-quadratic quantization (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog/): the full range's scale
// and the zero point that minimizes sum |e|^p, found by alternating a shrinkage of the errors with a mean. Importance
// is not used.
struct HalfQuadratic {
    static constexpr int iterations = 20;
    static constexpr float p = 0.7f;
    float beta[iterations];
    float threshold[iterations];  // errors below it shrink to zero: a < a^(p-1) / beta
};

template <int Size>
FOREGATE_INLINE Fit half_quadratic(const Group& group, const HalfQuadratic& schedule, Lanes least, float top) {
    const auto [scale, start] = full_range(group, least, top);
    const Lanes inverse = 1.0f / scale;
    Lanes zero = start;
    for (int i = 0; i < HalfQuadratic::iterations; ++i) {
        Lanes greatest = splat(0), sum = splat(0);
        for (int j = 0; j < Size; ++j) {
            const Lanes x = group.w[j] * inverse;
            const Lanes q = nearest(clamp(x + zero, 0, top));
            greatest = maximum(greatest, absolute(group.w[j] - (q - zero) * scale));
            sum += q - x;
        }
        if (any(greatest >= schedule.threshold[i])) {  // rare: usually every error shrinks to zero
            sum = splat(0);
            for (int j = 0; j < Size; ++j) {
                const Lanes q = nearest(clamp(group.w[j] * inverse + zero, 0, top));
                const Lanes d = group.w[j] - (q - zero) * scale;
                const Lanes a = maximum(absolute(d), splat(1e-30f));
                const Lanes power = exp2_of((HalfQuadratic::p - 1.0f) * log2_of(a));
                const Lanes shrunk = maximum(a - power / schedule.beta[i], splat(0));
                sum += q - (group.w[j] - (d < 0.0f ? -shrunk : shrunk)) * inverse;
            }
        }
        const Lanes next = sum * (1.0f / Size);
        if (!any(next != zero)) break;
        zero = next;
    }
    return {scale, clamp(zero, 0, top)};
}

}  // namespace foregate::quantize
