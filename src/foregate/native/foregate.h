/* The C interface of the native kernels: products of quantized or plain matrices with tokens, and whole experts.
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

/* Changes with every change of this interface: a caller built against another one must not call on. */
#define FG_INTERFACE 3
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

#ifdef __cplusplus
}
#endif
#endif
