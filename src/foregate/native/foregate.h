/* The C interface of the native kernels: products of quantized or plain matrices with tokens, whole experts, and
 * lookahead gates.
 *
 * All arrays are row-major and dense; activations and results are float32. A token's result is the same bit for bit
 * whatever other tokens are in the call, however many threads work, and however rows are split over them.
 * Functions that return int return 0, or another value after an error that fg_error() describes.
 */
#ifndef FOREGATE_H
#define FOREGATE_H

#include <stdint.h>

#if defined(_WIN32)
#define FG_API __declspec(dllexport)
#else
#define FG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What the numbers of a matrix or a bias are. 2, 3, 4 and 8 are quantized planes of so many bits. */
enum fg_kind { FG_Q2 = 2, FG_Q3 = 3, FG_Q4 = 4, FG_Q8 = 8, FG_BF16 = 16, FG_F16 = 17, FG_F32 = 32 };

/* W [rows, cols]: outputs by inputs. */
typedef struct fg_matrix {
    int32_t kind;          /* enum fg_kind */
    int64_t rows, cols;
    const void* data;      /* plain matrices: the numbers; quantized ones: the plane "low" */
    const uint8_t* high;   /* 3 bits */
    const uint8_t* scales; /* quantized */
    const uint8_t* zeros;  /* 3, 4 and 8 bits: "zeros"; 2 bits: "groups" */
    const float* base;     /* quantized */
} fg_matrix;

typedef struct fg_bias {
    int32_t kind;     /* FG_BF16, FG_F16 or FG_F32 */
    const void* data; /* NULL: no bias */
} fg_bias;

enum fg_function { FG_SILU, FG_GELU_TANH, FG_GELU_ERF, FG_RELU2, FG_RELU };
enum fg_layout { FG_UNGATED, FG_CONCATENATED, FG_INTERLEAVED };

/* From the first product to the input of the second: f(gate) * (up + up_offset), or f(up) without a gate.
 * The gate is clamped to at most `limit`, up to +-limit (infinity: not at all); FG_SILU is v * sigmoid(alpha * v). */
typedef struct fg_activation {
    int32_t function; /* enum fg_function */
    int32_t layout;   /* enum fg_layout: rows of the first matrix are up; gate then up; gate, up, gate, up, ... */
    float alpha, limit, up_offset;
} fg_activation;

/* One expert and the tokens routed to it. */
typedef struct fg_expert {
    fg_matrix up, down; /* `up` holds gate and up where the layout says so */
    fg_bias up_bias, down_bias;
    int64_t tokens;
    const int64_t* sources;      /* [tokens] rows of x */
    const int64_t* destinations; /* [tokens] rows of y, all different within a call */
    const float* weights;        /* [tokens] factors on the results; NULL: none */
} fg_expert;

/* What the router of a MoE layer gave the newest token, and how the sequence has used the layer's experts. */
typedef struct fg_history {
    int64_t experts, half_lives;
    const float* decays; /* [half_lives] what is left of a use a token later */
    float* scores;       /* [experts] */
    float* uses;         /* [half_lives, experts] decayed sums of uses */
    float* ages;         /* [experts] tokens since the last use */
} fg_history;

/* The lookahead gate of one source (foregate/lookahead/gate.py), and the reuse head of the source's own layer.
 * Quantized matrices read int8 activations. The MLP reads the source, zeros up to a multiple of 64, and the targets'
 * scores. `outputs` are the targets' experts in all. */
typedef struct fg_gate {
    int32_t normalize;      /* whether a token is divided by its root mean square first */
    fg_matrix base;         /* [outputs + the reuse head's width, source]: the targets' rows, then the head's */
    fg_matrix down, up;     /* the MLP: [width, source + zeros + outputs], [outputs, width]; data NULL: none */
    const float* base_bias; /* [base.rows] */
    const float* down_bias; /* [width] */
    int64_t targets;
    const fg_history* const* aims; /* [targets] of the layers predicted */
    const int64_t* top_k;          /* [targets] */
    const float *scales, *shifts;  /* [targets] of the probabilities */
    const fg_history* own;         /* of the source's layer; NULL: no reuse head, and nothing of what follows */
    int64_t windows;
    const float* reuse_up;     /* [windows, own.experts, width of the head] */
    const float* reuse_bias;   /* [windows, own.experts] */
    const float* reuse_shared; /* [windows, half_lives + 2] weights of log(1 + uses), log(1 + age), score - mean score */
} fg_gate;

/* Changes with every change of this interface: a caller built against another one must not call on. */
#define FG_INTERFACE 4
FG_API int fg_interface(void);

FG_API const char* fg_version(void);
FG_API const char* fg_error(void); /* of this thread's latest failed call */

FG_API const char* fg_isa(void);             /* the instruction set in use */
FG_API const char* fg_isas(void);            /* those that this machine can use, best first, comma-separated */
FG_API int fg_use_isa(const char* name);     /* NULL: the best */

FG_API int fg_threads(void);
FG_API int fg_set_threads(int threads);

/* y [tokens, rows] = x [tokens, cols] W^T. exact: float32 activations; otherwise, for quantized matrices, int8 ones. */
FG_API int fg_matmul(const float* x, int64_t tokens, const fg_matrix* matrix, int exact, float* y);

/* y[destination] = weight * expert(x[source]) for every token of every expert; other rows of y are left alone.
 * x: [tokens, up.cols]; y: [places, down.rows]. Experts of a call have matrices of one shape. */
FG_API int fg_moe(const float* x, int64_t tokens, const fg_expert* experts, int64_t count,
                  const fg_activation* activation, int exact, float* y, int64_t places);

/* Note what a router did: the newest token's scores [experts], and the experts that each token chose, oldest first:
 * chosen [tokens, top_k], where an index outside the experts is none. */
FG_API int fg_observe(fg_history* history, const float* scores, const int64_t* chosen, int64_t tokens, int64_t top_k);

/* answers [outputs]: the probabilities that any of the tokens x [tokens, base.cols] makes the target choose the expert;
 * with a reuse head, after them [windows, own.experts]: that the next tokens of each window use it, after the last one. */
FG_API int fg_predict(const fg_gate* gate, const float* x, int64_t tokens, float* answers);

#ifdef __cplusplus
}
#endif
#endif
