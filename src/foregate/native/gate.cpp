#include "gate.h"

#include <cmath>
#include <functional>
#include <limits>

#include "prepare.h"
#include "products.h"

namespace foregate {

namespace {

constexpr int64_t ALONE = 8 << 20;  // multiply-adds of a pass that the caller has done before threads wake
constexpr fg_activation SILU = {FG_SILU, FG_UNGATED, 1, std::numeric_limits<float>::infinity(), 0};

// Results of a pass, one row a token.
struct Results {
    float* base;         // [count, base.rows]
    float* corrections;  // [count, outputs], of the MLP
};

int64_t outputs_of(const fg_gate& gate) {
    int64_t outputs = 0;
    for (int64_t target = 0; target < gate.targets; target++) outputs += gate.aims[target]->experts;
    return outputs;
}

float inverse_rms(const float* x, int64_t count) {
    double squares = 0;
    for (int64_t i = 0; i < count; i++) squares += static_cast<double>(x[i]) * x[i];
    const double mean = squares / static_cast<double>(count);
    return static_cast<float>(1 / std::sqrt(mean + std::numeric_limits<float>::epsilon()));
}

// What the gate's matrices read of a token: its numbers, zeros up to a whole block, the targets' scores.
void gather(const fg_gate& gate, const float* x, int64_t cols, float* row) {
    const float scale = gate.normalize ? inverse_rms(x, gate.base.cols) : 1;
    std::transform(x, x + gate.base.cols, row, [scale](float value) { return value * scale; });
    if (cols == gate.base.cols) return;
    float* scores = row + blocks_of(gate.base.cols) * BLOCK;
    std::fill(row + gate.base.cols, scores, 0.0f);
    for (int64_t target = 0; target < gate.targets; target++)
        scores = std::copy_n(gate.aims[target]->scores, gate.aims[target]->experts, scores);
}

// Add a matrix times all tokens of a pass: results [count, matrix.rows].
void add(Products& products, const fg_matrix& matrix, fg_bias bias, const Tokens& tokens, int64_t count,
         float* results) {
    products.products.push_back({&matrix, bias, static_cast<int64_t>(products.views.size()), count});
    for (int64_t i = 0; i < count; i++) {
        products.views.push_back(tokens.view(i));
        products.rows.push_back(results + i * matrix.rows);
    }
}

// The gate's products for up to PASS tokens.
Results multiply(Runtime& runtime, const fg_gate& gate, const float* x, int64_t count, int64_t outputs) {
    const Kernels& kernels = *runtime.kernels;
    const bool mlp = gate.down.data;
    const int64_t width = mlp ? gate.down.rows : 0, cols = mlp ? gate.down.cols : gate.base.cols;
    Forms source_forms, inner_forms;
    source_forms.add(gate.base, false);
    if (mlp) {
        source_forms.add(gate.down, false);
        inner_forms.add(gate.up, false);
    }
    const Tokens source(runtime.inputs, count, cols, source_forms), inner(runtime.inner, count, width, inner_forms);
    const int64_t numbers = gate.base.rows + outputs + width + cols;
    float* const base = reinterpret_cast<float*>(runtime.hidden.reserve(count * numbers * sizeof(float)));
    float* const corrections = base + count * gate.base.rows;
    float* const hidden = corrections + count * outputs;
    float* const rows = hidden + count * width;

    for (int64_t i = 0; i < count; i++) gather(gate, x + i * gate.base.cols, cols, rows + i * cols);
    Products first, second;
    add(first, gate.base, {FG_F32, gate.base_bias}, source, count, base);
    if (mlp) {
        add(first, gate.down, {FG_F32, gate.down_bias}, source, count, hidden);
        add(second, gate.up, {}, inner, count, corrections);
    }
    const auto prepare = [&](int64_t token, int64_t from, int64_t to, bool exact, const TokenBuffers& buffers) {
        kernels.prepare(rows + token * cols, cols, from, to, exact, buffers);
    };
    const auto activate = [&](int64_t token, int64_t from, int64_t to, bool exact, const TokenBuffers& buffers) {
        kernels.activate(hidden + token * width, SILU, width, from, to, exact, buffers);
    };
    std::vector<Phase> phases = {source.phase(prepare), first.phase(kernels, false)};
    if (mlp) {
        phases.push_back(inner.phase(activate));
        phases.push_back(second.phase(kernels, false));
    }
    if (count * (gate.base.rows + width) * cols <= ALONE)
        run_alone(phases);
    else
        run(runtime, std::move(phases));
    return {base, mlp ? corrections : nullptr};
}

// A float as an integer of the same order, NaN at an end: sorting needs a total order.
int32_t order_of(float x) {
    const int32_t bits = __builtin_bit_cast(int32_t, x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

float from_order(int32_t order) { return __builtin_bit_cast(float, order ^ (order >> 31 & 0x7fffffff)); }

// Midway between the last logit that is chosen and the first that is not.
float boundary(const float* logits, int64_t experts, int64_t top_k, std::vector<int32_t>& order) {
    order.resize(experts);
    std::transform(logits, logits + experts, order.begin(), order_of);
    if (top_k >= experts) return from_order(*std::min_element(order.begin(), order.end()));
    const auto next = order.begin() + top_k;
    std::nth_element(order.begin(), next, order.end(), std::greater<int32_t>());
    return (from_order(*std::min_element(order.begin(), next)) + from_order(*next)) / 2;
}

// none [outputs]: the probability that no token so far chooses the expert.
void add_token(const fg_gate& gate, const float* logits, float* none, std::vector<int32_t>& order) {
    for (int64_t target = 0; target < gate.targets; target++) {
        const int64_t experts = gate.aims[target]->experts;
        const float edge = boundary(logits, experts, gate.top_k[target], order);
        const float scale = gate.scales[target], shift = gate.shifts[target];
        for (int64_t i = 0; i < experts; i++) none[i] *= 1 - sigmoid(scale * (logits[i] - edge) + shift);
        logits += experts;
        none += experts;
    }
}

// What the reuse head reads of an expert: [experts, half_lives + 2].
std::vector<float> features_of(const fg_history& history) {
    const int64_t experts = history.experts, features = history.half_lives + 2;
    std::vector<float> values(experts * features);
    float mean = 0;
    for (int64_t i = 0; i < experts; i++) mean += history.scores[i] / static_cast<float>(experts);
    for (int64_t i = 0; i < experts; i++) {
        float* const expert = &values[i * features];
        for (int64_t j = 0; j < history.half_lives; j++) expert[j] = std::log1p(history.uses[j * experts + i]);
        expert[features - 2] = std::log1p(history.ages[i]);
        expert[features - 1] = history.scores[i] - mean;
    }
    return values;
}

// In sums side by side, which compilers keep in one vector.
float dot(const float* a, const float* b, int64_t count) {
    constexpr int64_t LANES = 8;
    float sums[LANES] = {}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++) sums[lane] += a[i + lane] * b[i + lane];
    for (; i < count; i++) total += a[i] * b[i];
    for (float sum : sums) total += sum;
    return total;
}

// The reuse head's answer after a token from the first product of which it is given its `width` results.
void predict_reuse(const fg_gate& gate, const float* first, int64_t width, float* reuse) {
    const int64_t experts = gate.own->experts, features = gate.own->half_lives + 2;
    const std::vector<float> known = features_of(*gate.own);
    std::vector<float> inner(width);
    for (int64_t i = 0; i < width; i++) inner[i] = apply<FG_SILU>(first[i], 1);
    for (int64_t window = 0; window < gate.windows; window++)
        for (int64_t i = 0; i < experts; i++) {
            const int64_t at = window * experts + i;
            float logit = gate.reuse_bias[at] + dot(gate.reuse_up + at * width, inner.data(), width);
            for (int64_t j = 0; j < features; j++)
                logit += gate.reuse_shared[window * features + j] * known[i * features + j];
            reuse[at] = sigmoid(logit);
        }
}

}  // namespace

void observe(fg_history& history, const float* scores, const int64_t* chosen, int64_t tokens, int64_t top_k) {
    const int64_t experts = history.experts;
    for (int64_t token = 0; token < tokens; token++, chosen += top_k) {
        for (int64_t j = 0; j < history.half_lives; j++)
            for (int64_t i = 0; i < experts; i++) history.uses[j * experts + i] *= history.decays[j];
        for (int64_t i = 0; i < experts; i++) history.ages[i] += 1;
        for (const int64_t* expert = chosen; expert != chosen + top_k; expert++) {
            if (*expert < 0 || *expert >= experts || history.ages[*expert] == 0) continue;  // none, or named before
            for (int64_t j = 0; j < history.half_lives; j++) history.uses[j * experts + *expert] += 1;
            history.ages[*expert] = 0;
        }
    }
    std::copy_n(scores, experts, history.scores);
}

void predict(const fg_gate& gate, const float* x, int64_t tokens, float* answers) {
    Runtime& shared = runtime();
    const std::lock_guard lock(shared.mutex);
    const int64_t outputs = outputs_of(gate);
    std::vector<int32_t> order;
    std::fill_n(answers, outputs, 1.0f);
    for (int64_t start = 0; start < tokens; start += PASS) {
        const int64_t count = std::min(PASS, tokens - start);
        const auto [base, corrections] = multiply(shared, gate, x + start * gate.base.cols, count, outputs);
        for (int64_t token = 0; token < count; token++) {
            float* const logits = base + token * gate.base.rows;
            for (int64_t i = 0; corrections && i < outputs; i++) logits[i] += corrections[token * outputs + i];
            add_token(gate, logits, answers, order);
        }
        const float* const newest = base + (count - 1) * gate.base.rows;
        if (gate.own && start + count == tokens)
            predict_reuse(gate, newest + outputs, gate.base.rows - outputs, answers + outputs);
    }
    for (int64_t i = 0; i < outputs; i++) answers[i] = 1 - answers[i];
}

}  // namespace foregate
