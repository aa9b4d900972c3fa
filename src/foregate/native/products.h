// Products of matrices with the tokens of a pass, as phases of work for all threads or for the caller alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime.h"

namespace foregate {

constexpr int64_t PASS = 128;               // tokens (per expert that they use) at a time: bounds the memory
constexpr int64_t ITEM_BYTES = 48 << 10;    // of weights in a work item: small against a product, large against a claim
constexpr int64_t ITEM_BLOCKS = 32;         // of a token in a work item
constexpr int64_t ROW_GROUP = 8;            // kernels work on so many rows together

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t blocks_of(int64_t cols) { return ceil_div(cols, BLOCK); }

inline bool is_quantized(const fg_matrix& m) { return m.kind <= FG_Q8; }

inline int64_t row_bytes(const fg_matrix& m) {
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

// The caller does it all.
inline void run_alone(const std::vector<Phase>& phases) {
    for (const Phase& phase : phases)
        for (int64_t item = 0; item < phase.count; item++) phase.work(item);
}

inline void run(Runtime& runtime, std::vector<Phase> phases) {
    if (!runtime.pool) runtime.pool = std::make_unique<Pool>(runtime.threads);
    runtime.pool->run(std::move(phases));
}

}  // namespace foregate
