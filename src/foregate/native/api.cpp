// The C interface: checks, and errors instead of exceptions.
#include <cmath>
#include <exception>
#include <stdexcept>
#include <string>

#include "foregate.h"
#include "gate.h"
#include "layer.h"
#include "runtime.h"

namespace {

thread_local std::string error;

template <class Function>
int guarded(Function function) {
    try {
        function();
        return 0;
    } catch (const std::exception& e) {
        error = e.what();
        return 1;
    }
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void check(const fg_matrix& m) {
    const bool quantized = m.kind == FG_Q2 || m.kind == FG_Q3 || m.kind == FG_Q4 || m.kind == FG_Q8;
    require(quantized || m.kind == FG_BF16 || m.kind == FG_F16 || m.kind == FG_F32, "unknown kind of matrix");
    require(m.rows > 0 && m.cols > 0, "a matrix is empty");
    require(m.data, "a matrix has no data");
    require(!quantized || (m.scales && m.zeros && m.base), "a quantized matrix lacks a plane");
    require(m.kind != FG_Q3 || m.high, "a matrix of 3 bits lacks the plane 'high'");
}

void check(const fg_bias& bias) {
    require(!bias.data || bias.kind == FG_BF16 || bias.kind == FG_F16 || bias.kind == FG_F32, "unknown kind of bias");
}

void check(const fg_expert& e, const fg_expert& like, int layout, int64_t tokens, int64_t places) {
    check(e.up);
    check(e.down);
    check(e.up_bias);
    check(e.down_bias);
    require(e.up.rows == e.down.cols * (layout == FG_UNGATED ? 1 : 2), "the matrices of an expert do not fit together");
    require(e.up.cols == like.up.cols && e.up.rows == like.up.rows && e.down.rows == like.down.rows,
            "the experts of one call have matrices of different shapes");
    require(e.tokens >= 0, "an expert has a negative number of tokens");
    require(e.tokens == 0 || (e.sources && e.destinations), "an expert has no lists of tokens");
    for (int64_t i = 0; i < e.tokens; i++) {
        require(e.sources[i] >= 0 && e.sources[i] < tokens, "an expert's source is not a row of x");
        require(e.destinations[i] >= 0 && e.destinations[i] < places, "an expert's destination is not a row of y");
    }
}

void check(const fg_history* h) {
    require(h && h->experts > 0 && h->half_lives >= 0, "a history is missing or empty");
    require(h->scores && h->ages && (h->half_lives == 0 || (h->decays && h->uses)), "a history lacks an array");
}

void check(const fg_gate& g) {
    require(g.targets > 0 && g.aims && g.top_k && g.scales && g.shifts, "a gate lacks its targets");
    int64_t outputs = 0;
    for (int64_t i = 0; i < g.targets; i++) {
        check(g.aims[i]);
        require(g.top_k[i] > 0, "a target's top_k must be positive");
        outputs += g.aims[i]->experts;
    }
    check(g.base);
    require(g.base_bias && g.base.rows >= outputs, "a gate's first matrix has too few rows or no bias");
    if (g.down.data) {
        check(g.down);
        check(g.up);
        const int64_t read = (g.base.cols + foregate::BLOCK - 1) / foregate::BLOCK * foregate::BLOCK;
        require(g.down_bias && g.down.cols == read + outputs && g.up.rows == outputs && g.up.cols == g.down.rows,
                "the matrices of a gate do not fit together");
    }
    if (g.own) {
        check(g.own);
        require(g.windows > 0 && g.reuse_up && g.reuse_bias && g.reuse_shared, "a reuse head lacks a matrix");
    }
}

}  // namespace

int fg_interface(void) { return FG_INTERFACE; }

const char* fg_version(void) { return FOREGATE_VERSION; }

const char* fg_error(void) { return error.c_str(); }

const char* fg_isa(void) { return foregate::runtime().kernels->name; }

const char* fg_isas(void) { return foregate::kernel_names().c_str(); }

int fg_use_isa(const char* name) {
    return guarded([&] {
        const foregate::Kernels& kernels = foregate::find_kernels(name);
        foregate::Runtime& runtime = foregate::runtime();
        const std::lock_guard lock(runtime.mutex);
        runtime.kernels = &kernels;
    });
}

int fg_threads(void) { return foregate::runtime().threads; }

int fg_set_threads(int threads) {
    return guarded([&] {
        require(threads >= 1 && threads <= 1024, "the number of threads must be from 1 to 1024");
        foregate::Runtime& runtime = foregate::runtime();
        const std::lock_guard lock(runtime.mutex);
        if (threads != runtime.threads) runtime.pool.reset();
        runtime.threads = threads;
    });
}

int fg_matmul(const float* x, int64_t tokens, const fg_matrix* matrix, int exact, float* y) {
    return guarded([&] {
        require(matrix, "no matrix");
        check(*matrix);
        require(tokens >= 0, "a negative number of tokens");
        require(tokens == 0 || (x && y), "no input or no output");
        foregate::matmul(x, tokens, *matrix, exact != 0, y);
    });
}

int fg_moe(const float* x, int64_t tokens, const fg_expert* experts, int64_t count, const fg_activation* activation,
           int exact, float* y, int64_t places) {
    return guarded([&] {
        require(count >= 0 && (count == 0 || (experts && x && y)), "no experts, no input or no output");
        require(activation && activation->function >= FG_SILU && activation->function <= FG_RELU, "unknown activation");
        require(activation->layout >= FG_UNGATED && activation->layout <= FG_INTERLEAVED, "unknown layout");
        require(activation->limit > 0, "the limit must be positive");
        for (int64_t i = 0; i < count; i++) check(experts[i], experts[0], activation->layout, tokens, places);
        foregate::moe(x, experts, count, *activation, exact != 0, y);
    });
}

int fg_observe(fg_history* history, const float* scores, const int64_t* chosen, int64_t tokens, int64_t top_k) {
    return guarded([&] {
        check(history);
        require(tokens >= 0 && top_k >= 0 && scores && (chosen || tokens * top_k == 0), "no scores or no choice");
        foregate::observe(*history, scores, chosen, tokens, top_k);
    });
}

int fg_predict(const fg_gate* gate, const float* x, int64_t tokens, float* answers) {
    return guarded([&] {
        require(gate, "no gate");
        check(*gate);
        require(tokens > 0 && x && answers, "no token or nowhere to answer");
        foregate::predict(*gate, x, tokens, answers);
    });
}
