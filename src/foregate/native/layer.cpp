#include "layer.h"

#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace foregate {

namespace {

constexpr int64_t PASS = 128;               // tokens (per expert that they use) at a time: bounds the memory
constexpr int64_t ITEM_BYTES = 48 << 10;    // of weights in a work item: small against a product, large against a claim
constexpr int64_t ITEM_BLOCKS = 32;         // of a token in a work item
constexpr int64_t ROW_GROUP = 8;            // kernels work on so many rows together

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t blocks_of(int64_t cols) { return ceil_div(cols, BLOCK); }

bool is_quantized(const fg_matrix& m) { return m.kind <= FG_Q8; }

int64_t row_bytes(const fg_matrix& m) {
    return is_quantized(m) ? blocks_of(m.cols) * BLOCK * m.kind / 8 : m.cols * (m.kind == FG_F32 ? 4 : 2);
}

// Which forms of a token the matrices on one side of the experts read.
struct Forms {
    bool int8 = false, exact = false;

    void add(const fg_matrix& m, bool want_exact) { (is_quantized(m) && !want_exact ? int8 : exact) = true; }
};

// Memory for `count` prepared tokens of `cols` numbers.
class Tokens {
public:
    Tokens(Scratch& scratch, int64_t count, int64_t cols, Forms forms) : forms_(forms), cols_(cols) {
        const int64_t blocks = ceil_div(blocks_of(cols), CHUNK) * CHUNK;
        const size_t values = forms.exact ? blocks * BLOCK * sizeof(float) : 0;
        const size_t codes = forms.int8 ? blocks * BLOCK : 0, numbers = forms.int8 ? blocks * sizeof(float) : 0;
        char* p = scratch.reserve(count * (values + codes + 4 * numbers));
        for (int64_t i = 0; i < count; i++) {
            TokenBuffers t;
            t.values = reinterpret_cast<float*>(p), p += values;
            t.codes = reinterpret_cast<int8_t*>(p), p += codes;
            std::memset(p, 0, 4 * numbers);  // padding is zero
            t.scales = reinterpret_cast<float*>(p), p += numbers;
            t.sums = reinterpret_cast<float*>(p), p += numbers;
            t.evens = reinterpret_cast<int16_t*>(p), p += numbers;
            t.odds = reinterpret_cast<int16_t*>(p), p += numbers;
            buffers_.push_back(t);
        }
    }

    TokenView view(int64_t i) const {
        const TokenBuffers& t = buffers_[i];
        return {t.values, t.codes, t.scales, t.sums, t.evens, t.odds};
    }

    // A phase that calls fill(token, first block, last block, exact, buffers) for all parts of all tokens.
    template <class Fill>
    Phase phase(Fill fill) const {
        const int64_t blocks = blocks_of(cols_), parts = ceil_div(blocks, ITEM_BLOCKS);
        return {static_cast<int64_t>(buffers_.size()) * parts, [this, fill, blocks, parts](int64_t item) {
                    const int64_t token = item / parts, first = item % parts * ITEM_BLOCKS;
                    const int64_t last = std::min(first + ITEM_BLOCKS, blocks);
                    if (forms_.int8) fill(token, first, last, false, buffers_[token]);
                    if (forms_.exact) fill(token, first, last, true, buffers_[token]);
                }};
    }

private:
    Forms forms_;
    int64_t cols_;
    std::vector<TokenBuffers> buffers_;
};

// A matrix times some of the tokens of a pass.
struct Product {
    const fg_matrix* matrix;
    fg_bias bias;
    int64_t first, count;  // of the tokens
};

// The products of one side of the experts: token i of the pass is views[i], its result goes to rows[i].
struct Products {
    std::vector<Product> products;
    std::vector<TokenView> views;
    std::vector<float*> rows;
    std::vector<float> weights;  // empty: none

    Phase phase(const Kernels& kernels, bool exact) const {
        struct Item {
            const Product* product;
            int64_t first, last;
        };
        std::vector<Item> items;
        for (const Product& product : products) {
            const fg_matrix& m = *product.matrix;
            const int64_t step = std::max<int64_t>(1, ITEM_BYTES / row_bytes(m) / ROW_GROUP) * ROW_GROUP;
            for (int64_t row = 0; row < m.rows; row += step)
                items.push_back({&product, row, std::min(row + step, m.rows)});
        }
        const auto count = static_cast<int64_t>(items.size());
        return {count, [this, &kernels, exact, items = std::move(items)](int64_t i) {
                    const auto [product, first, last] = items[i];
                    const int kind = product->matrix->kind;
                    const bool int8 = is_quantized(*product->matrix) && !exact;
                    const Output output = {&rows[product->first],
                                           weights.empty() ? nullptr : &weights[product->first], product->bias};
                    const RowsKernel kernel = (int8 ? kernels.int8_rows : kernels.exact_rows)[kind];
                    kernel(*product->matrix, first, last, &views[product->first], product->count, output);
                }};
    }
};

void run(Runtime& runtime, std::vector<Phase> phases) {
    if (!runtime.pool) runtime.pool = std::make_unique<Pool>(runtime.threads);
    runtime.pool->run(std::move(phases));
}

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
