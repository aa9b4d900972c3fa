#include "layer.h"

#include <algorithm>

#include "products.h"

namespace foregate {

namespace {

// Some tokens of one expert: positions first..first+count-1 of its lists.
struct Segment {
    const fg_expert* expert;
    int64_t first, count;
};

// Cut the experts' tokens into passes.
std::vector<std::vector<Segment>> passes_of(const fg_expert* experts, int64_t count) {
    std::vector<std::vector<Segment>> passes;
    int64_t room = 0;
    for (const fg_expert* expert = experts; expert != experts + count; expert++)
        for (int64_t first = 0, size; first < expert->tokens; first += size) {
            if (room == 0) {
                passes.emplace_back();
                room = PASS;
            }
            size = std::min(room, expert->tokens - first);
            room -= size;
            passes.back().push_back({expert, first, size});
        }
    return passes;
}

void run_pass(Runtime& runtime, const std::vector<Segment>& segments, const float* x, const fg_activation& activation,
              bool exact, float* y) {
    const Kernels& kernels = *runtime.kernels;
    const fg_matrix &up = segments[0].expert->up, &down = segments[0].expert->down;
    Forms outer_forms, inner_forms;
    std::vector<int64_t> sources;  // the rows of x that are used, each once
    int64_t pairs = 0;
    for (const auto& [expert, first, count] : segments) {
        outer_forms.add(expert->up, exact);
        inner_forms.add(expert->down, exact);
        sources.insert(sources.end(), expert->sources + first, expert->sources + first + count);
        pairs += count;
    }
    std::sort(sources.begin(), sources.end());
    sources.erase(std::unique(sources.begin(), sources.end()), sources.end());

    const Tokens outer(runtime.inputs, static_cast<int64_t>(sources.size()), up.cols, outer_forms);
    const Tokens inner(runtime.inner, pairs, down.cols, inner_forms);
    float* const hidden = reinterpret_cast<float*>(runtime.hidden.reserve(pairs * up.rows * sizeof(float)));
    Products first_products, second_products;
    for (const auto& [expert, first, count] : segments) {
        const auto at = static_cast<int64_t>(first_products.views.size());
        first_products.products.push_back({&expert->up, expert->up_bias, at, count});
        second_products.products.push_back({&expert->down, expert->down_bias, at, count});
        for (int64_t i = first; i < first + count; i++) {
            const auto pair = static_cast<int64_t>(first_products.views.size());
            const auto source = std::lower_bound(sources.begin(), sources.end(), expert->sources[i]) - sources.begin();
            first_products.views.push_back(outer.view(source));
            first_products.rows.push_back(hidden + pair * up.rows);
            second_products.views.push_back(inner.view(pair));
            second_products.rows.push_back(y + expert->destinations[i] * down.rows);
            second_products.weights.push_back(expert->weights ? expert->weights[i] : 1);
        }
    }

    const auto prepare = [&](int64_t token, int64_t first, int64_t last, bool as_exact, const TokenBuffers& buffers) {
        kernels.prepare(x + sources[token] * up.cols, up.cols, first, last, as_exact, buffers);
    };
    const auto activate = [&](int64_t pair, int64_t first, int64_t last, bool as_exact, const TokenBuffers& buffers) {
        kernels.activate(hidden + pair * up.rows, activation, down.cols, first, last, as_exact, buffers);
    };
    run(runtime, {outer.phase(prepare), first_products.phase(kernels, exact), inner.phase(activate),
                  second_products.phase(kernels, exact)});
}

}  // namespace

void matmul(const float* x, int64_t tokens, const fg_matrix& matrix, bool exact, float* y) {
    Runtime& shared = runtime();
    const std::lock_guard lock(shared.mutex);
    const Kernels& kernels = *shared.kernels;
    Forms forms;
    forms.add(matrix, exact);
    for (int64_t start = 0; start < tokens; start += PASS) {
        const int64_t count = std::min(PASS, tokens - start);
        const Tokens inputs(shared.inputs, count, matrix.cols, forms);
        Products products;
        products.products.push_back({&matrix, {}, 0, count});
        for (int64_t i = 0; i < count; i++) {
            products.views.push_back(inputs.view(i));
            products.rows.push_back(y + (start + i) * matrix.rows);
        }
        const auto prepare = [&](int64_t token, int64_t first, int64_t last, bool as_exact, const TokenBuffers& to) {
            kernels.prepare(x + (start + token) * matrix.cols, matrix.cols, first, last, as_exact, to);
        };
        run(shared, {inputs.phase(prepare), products.phase(kernels, exact)});
    }
}

void moe(const float* x, const fg_expert* experts, int64_t count, const fg_activation& activation, bool exact,
         float* y) {
    Runtime& shared = runtime();
    const std::lock_guard lock(shared.mutex);
    for (const auto& segments : passes_of(experts, count)) run_pass(shared, segments, x, activation, exact, y);
}

}  // namespace foregate
