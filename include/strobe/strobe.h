/* strobe: exact attention (FlashAttention-2 and beyond) behind a C ABI.
 *
 * Plain structs, a status per call and a text for the last error of the calling thread; no exception crosses this
 * interface and no call keeps a pointer after it returned (on CUDA: after the stream passed it). Usable from C11. Any number
 * of threads may call at once, each with outputs and a workspace of its own.
 *
 * Notation: B batch, Sq / Sk query / key rows, H / Hk query / key heads (H divisible by Hk), D head_dim, Dv head_dim_v,
 * Tq / Tk all query / key rows of a variable-length ("varlen") batch. Strides count elements, sizes count elements unless
 * a name says bytes. */
#ifndef STROBE_STROBE_H
#define STROBE_STROBE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define STROBE_API __declspec(dllexport)
#else
#define STROBE_API __attribute__((visibility("default")))
#endif

#define STROBE_MAX_DIMS 5

typedef enum strobe_status {
    STROBE_OK = 0,
    STROBE_INVALID_ARGUMENT = 1, /* the call contradicts itself or this interface; the text names the argument */
    STROBE_UNSUPPORTED = 2,      /* a meaningful call that no implementation of this build and machine serves */
    STROBE_DEVICE_ERROR = 3,     /* the driver or the device refused */
    STROBE_INTERNAL_ERROR = 4    /* a bug in strobe */
} strobe_status;

typedef enum strobe_dtype {
    STROBE_F32 = 0,
    STROBE_BF16 = 1,
    STROBE_F16 = 2,
    STROBE_I32 = 3,
    STROBE_U8 = 4
} strobe_dtype;

typedef enum strobe_device_type { STROBE_CPU = 0, STROBE_CUDA = 1 } strobe_device_type;

/* A view of somebody's memory. ndim = 0 says "not given". */
typedef struct strobe_tensor {
    void *data;
    int32_t dtype;        /* strobe_dtype */
    int32_t device_type;  /* strobe_device_type */
    int32_t device_index; /* which CUDA device; 0 on the CPU */
    int32_t ndim;
    int64_t shape[STROBE_MAX_DIMS];
    int64_t strides[STROBE_MAX_DIMS];
} strobe_tensor;

/* What is to be computed:  out = dropout(softmax(score(q k^T))) v. D and Dv may differ: 1 to 512 on the CPU, 1 to 256 on CUDA.
 *
 * score: s = softmax_scale * q.k;  softcap > 0: s = softcap * tanh(s / softcap);  s += bias;
 *        s -= alibi_slope * |i + diagonal - j|;  s = -inf where the mask hides key j from query i.
 * mask:  i + diagonal - window_left <= j <= i + diagonal + window_right, causal being window_right = 0.
 *        diagonal = Sk - Sq (bottom-right alignment), or q_position - k_position when has_positions is set.
 *
 * Initialise with strobe_attention_init, then set what differs. */
typedef struct strobe_attention {
    uint32_t struct_size; /* sizeof(strobe_attention) of the caller's header */
    int32_t num_threads;  /* CPU: threads for this call; 0: strobe_num_threads() */

    strobe_tensor q; /* (B, Sq, H, D); varlen (Tq, H, D). f32, bf16 or f16; unit stride over D */
    strobe_tensor k; /* (B, Sk, Hk, D); varlen (Tk, Hk, D) */
    strobe_tensor v; /* (B, Sk, Hk, Dv); varlen (Tk, Hk, Dv) */

    strobe_tensor cu_seqlens_q; /* (B + 1) i32 prefix sums, from 0; not given: q is (B, Sq, H, D) */
    strobe_tensor cu_seqlens_k; /* (B + 1) i32; not given: k and v are (B, Sk, Hk, D) */
    strobe_tensor seqused_q;    /* (B) i32: rows of each sequence that count; those behind get out = 0, lse = -inf */
    strobe_tensor seqused_k;    /* (B) i32: keys of each sequence that count */
    int64_t max_seqlen_q;       /* varlen: at least the longest query sequence; on CUDA not checked: less gives wrong results */
    int64_t max_seqlen_k;       /* varlen: at least the longest key sequence; likewise */

    strobe_tensor alibi_slopes; /* (H) or (B, H) f32 */
    strobe_tensor bias;         /* (B, H, Sq, Sk), each extent may be 1 (broadcast), any strides; f32 or the dtype of q */

    int32_t causal;           /* non-zero: window_right = 0 */
    int32_t deterministic;    /* non-zero: the backward gives the same bits each time */
    int64_t window_left;      /* -1: unbounded */
    int64_t window_right;     /* -1: unbounded */
    int32_t has_positions;    /* non-zero: q_position and k_position replace bottom-right alignment */
    int32_t has_softmax_scale;/* zero: 1 / sqrt(D) */
    int64_t q_position;       /* position of the first query row on the axis that both blocks share */
    int64_t k_position;       /* position of the first key row */
    double softmax_scale;
    double softcap;           /* 0: none */
    double dropout_p;         /* probability of dropping, rounded to a multiple of 2^-16; 0: none */
    uint64_t dropout_seed;
    uint64_t dropout_offset;
    const char *implementation; /* NULL: the first that serves the call; else a name that strobe_implementation gives */
} strobe_attention;

typedef struct strobe_forward {
    uint32_t struct_size;
    uint32_t reserved;
    strobe_tensor out; /* (B, Sq, H, Dv); varlen (Tq, H, Dv); the dtype of q, or f32 */
    strobe_tensor lse; /* (B, H, Sq); varlen (H, Tq); f32, natural log; -inf on a row that sees no key; may be left out */
    void *workspace;   /* scratch on the call's device, of any alignment and content; NULL where the plan asks for none */
    size_t workspace_bytes; /* at least strobe_plan.workspace_bytes */
} strobe_forward;

typedef struct strobe_backward {
    uint32_t struct_size;
    int32_t accumulate; /* non-zero: add to dq, dk, dv, which are f32 then */
    strobe_tensor out;  /* as the forward wrote them; of the whole sequence when k, v are a block of it */
    strobe_tensor lse;
    strobe_tensor dout; /* shape of out, dtype of q */
    strobe_tensor dlse; /* shape of lse, f32; not given: zero */
    strobe_tensor dq;   /* shapes of q, k, v; the dtype of q, or f32 (all three alike) */
    strobe_tensor dk;
    strobe_tensor dv;
    strobe_tensor dbias; /* shape of bias, f32 or the dtype of bias; not given: not computed */
    void *workspace;     /* as in strobe_forward */
    size_t workspace_bytes;
} strobe_backward;

/* How a call would run. */
typedef struct strobe_plan {
    uint32_t struct_size;
    uint32_t reserved;
    size_t workspace_bytes;
    char implementation[64];
    char explanation[1024]; /* a line per implementation that was asked: why it was passed over, or what it will launch */
} strobe_plan;

static inline void strobe_attention_init(strobe_attention *a) {
    memset(a, 0, sizeof *a);
    a->struct_size = (uint32_t)sizeof *a;
    a->window_left = -1;
    a->window_right = -1;
}

static inline void strobe_forward_init(strobe_forward *f) {
    memset(f, 0, sizeof *f);
    f->struct_size = (uint32_t)sizeof *f;
}

static inline void strobe_backward_init(strobe_backward *b) {
    memset(b, 0, sizeof *b);
    b->struct_size = (uint32_t)sizeof *b;
}

/* A dense row-major view of at most STROBE_MAX_DIMS extents. What no memory holds stays visible to the call that refuses it: strides
 * beyond int64 are INT64_MAX, and of another ndim only the number is kept. */
static inline strobe_tensor strobe_tensor_dense(void *data, strobe_dtype dtype, strobe_device_type device, int32_t ndim,
                                                const int64_t *shape) {
    strobe_tensor t;
    int64_t stride = 1;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.dtype = (int32_t)dtype;
    t.device_type = (int32_t)device;
    t.ndim = ndim;
    if (ndim > STROBE_MAX_DIMS) return t;
    for (int32_t i = ndim - 1; i >= 0; --i) {
        t.shape[i] = shape[i];
        t.strides[i] = stride;
        if (shape[i] > 1) stride = stride <= INT64_MAX / shape[i] ? stride * shape[i] : INT64_MAX;
    }
    return t;
}

/* Compute. `stream` is a cudaStream_t on CUDA and ignored on the CPU, where the call returns when the work is done.
 * Neither call allocates or synchronises; both can be captured in a CUDA graph. */
STROBE_API strobe_status strobe_attention_forward(const strobe_attention *attention, const strobe_forward *forward,
                                                  void *stream);
STROBE_API strobe_status strobe_attention_backward(const strobe_attention *attention, const strobe_backward *backward,
                                                   void *stream);

/* Ask first: is the call served, by which implementation, with how much workspace? Data pointers are not looked at and may
 * be NULL; everything else is checked as in the call itself. `plan` needs its struct_size set. */
STROBE_API strobe_status strobe_attention_forward_plan(const strobe_attention *attention, const strobe_forward *forward,
                                                       strobe_plan *plan);
STROBE_API strobe_status strobe_attention_backward_plan(const strobe_attention *attention,
                                                        const strobe_backward *backward, strobe_plan *plan);

/* Merge partial results over disjoint key sets: out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).
 * Parts: out f32, bf16 or f16 of one shape, lse f32; `out` and `lse` may be the first part itself (in place). On CUDA at most
 * 448 parts in one call. */
STROBE_API strobe_status strobe_lse_merge(int32_t num_parts, const strobe_tensor *part_out, const strobe_tensor *part_lse,
                                          const strobe_tensor *out, const strobe_tensor *lse, void *stream);

/* The dropout mask that `attention` applies: keep is u8 (B, H, Sq, Sk), 1 = kept. Varlen: (B, H, max_seqlen_q,
 * max_seqlen_k). Only the shapes, the positions and the dropout fields of `attention` are used. */
STROBE_API strobe_status strobe_dropout_mask(const strobe_attention *attention, const strobe_tensor *keep, void *stream);

/* The text for the calling thread's last failed call; "" when none failed. Valid until its next call. */
STROBE_API const char *strobe_last_error(void);
STROBE_API const char *strobe_version(void);

/* The implementations of this build in the order in which they are asked; NULL past the last. */
STROBE_API const char *strobe_implementation(int32_t index);

/* Threads that a CPU call uses by default: the processors this process may run on, until set. */
STROBE_API int32_t strobe_num_threads(void);
STROBE_API strobe_status strobe_set_num_threads(int32_t num_threads);

#ifdef __cplusplus
}
#endif

#endif
