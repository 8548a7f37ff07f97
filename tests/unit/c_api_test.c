/* The C ABI from plain C11, through the shared library. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "strobe/strobe.h"

static int failures = 0;

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, strobe_last_error()); \
            ++failures;                                                                           \
        }                                                                                         \
    } while (0)

enum { B = 2, SQ = 5, SK = 7, H = 4, HK = 2, D = 8 };

static void *owned[64];
static size_t num_owned;

/* Lives until the program ends, which frees it. */
static void *allocate(size_t bytes) {
    void *p = malloc(bytes);
    if (!p || num_owned == sizeof owned / sizeof *owned) abort();
    return owned[num_owned++] = p;
}

static void free_all(void) {
    while (num_owned > 0) free(owned[--num_owned]);
}

static float *values(size_t count) {
    float *x = allocate(count * sizeof *x);
    for (size_t n = 0; n < count; ++n) x[n] = (float)((double)(n * 2654435761u % 1000u) / 500.0 - 1.0);
    return x;
}

static strobe_tensor tensor(int32_t ndim, const int64_t *shape) {
    size_t count = 1;
    for (int32_t i = 0; i < ndim; ++i) count *= (size_t)shape[i];
    return strobe_tensor_dense(values(count), STROBE_F32, STROBE_CPU, ndim, shape);
}

/* out and lse of one row, by definition. */
static double row_error(const strobe_attention *a, const strobe_forward *f, int b, int h, int i) {
    const float *q = (const float *)a->q.data + ((size_t)(b * SQ + i) * H + (size_t)h) * D;
    double score[SK], sum = 0, worst = 0, lse;
    for (int j = 0; j < SK; ++j) {
        const float *k = (const float *)a->k.data + ((size_t)(b * SK + j) * HK + (size_t)(h / (H / HK))) * D;
        score[j] = -INFINITY;
        if (a->causal && j > i + SK - SQ) continue;
        score[j] = 0;
        for (int d = 0; d < D; ++d) score[j] += (double)q[d] * k[d];
        score[j] /= sqrt(D);
        sum += exp(score[j]);
    }
    lse = log(sum);
    worst = fabs(lse - ((const float *)f->lse.data)[(b * H + h) * SQ + i]);
    for (int d = 0; d < D; ++d) {
        double out = 0, error;
        for (int j = 0; j < SK; ++j) {
            out += exp(score[j] - lse) * ((const float *)a->v.data)[((size_t)(b * SK + j) * HK + (size_t)(h / (H / HK))) * D + (size_t)d];
        }
        error = fabs(out - ((const float *)f->out.data)[((size_t)(b * SQ + i) * H + (size_t)h) * D + (size_t)d]);
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

int main(void) {
    atexit(free_all);
    const int64_t q_shape[] = {B, SQ, H, D}, k_shape[] = {B, SK, HK, D}, lse_shape[] = {B, H, SQ}, mask_shape[] = {B, H, SQ, SK};
    strobe_attention attention;
    strobe_forward forward;
    strobe_backward backward;
    strobe_plan plan;
    strobe_attention_init(&attention);
    strobe_forward_init(&forward);
    strobe_backward_init(&backward);
    memset(&plan, 0, sizeof plan);
    plan.struct_size = sizeof plan;

    attention.q = tensor(4, q_shape);
    attention.k = tensor(4, k_shape);
    attention.v = tensor(4, k_shape);
    attention.causal = 1;
    forward.out = tensor(4, q_shape);
    forward.lse = tensor(3, lse_shape);

    CHECK(strobe_attention_forward_plan(&attention, &forward, &plan) == STROBE_OK);
    CHECK(plan.implementation[0] != '\0');
    CHECK(plan.explanation[0] != '\0');
    forward.workspace_bytes = plan.workspace_bytes;
    forward.workspace = allocate(plan.workspace_bytes + 1);
    CHECK(strobe_attention_forward(&attention, &forward, NULL) == STROBE_OK);
    for (int b = 0; b < B; ++b) {
        for (int h = 0; h < H; ++h) {
            for (int i = 0; i < SQ; ++i) CHECK(row_error(&attention, &forward, b, h, i) < 1e-5);
        }
    }

    backward.out = forward.out;
    backward.lse = forward.lse;
    backward.dout = tensor(4, q_shape);
    backward.dq = tensor(4, q_shape);
    backward.dk = tensor(4, k_shape);
    backward.dv = tensor(4, k_shape);
    CHECK(strobe_attention_backward_plan(&attention, &backward, &plan) == STROBE_OK);
    backward.workspace_bytes = plan.workspace_bytes;
    backward.workspace = allocate(plan.workspace_bytes + 1);
    CHECK(strobe_attention_backward(&attention, &backward, NULL) == STROBE_OK);
    {
        /* Softmax sums to one: over all keys of a key head, dv adds up to dout over the queries that share it. */
        double difference = 0;
        for (int d = 0; d < D; ++d) {
            for (int n = 0; n < B * SK * HK; ++n) difference += ((float *)backward.dv.data)[n * D + d];
            for (int n = 0; n < B * SQ * H; ++n) difference -= ((float *)backward.dout.data)[n * D + d];
        }
        CHECK(fabs(difference) < 1e-3);
    }

    {
        unsigned char keep[B * H * SQ * SK];
        strobe_tensor mask = strobe_tensor_dense(keep, STROBE_U8, STROBE_CPU, 4, mask_shape);
        int kept = 0;
        attention.dropout_p = 0.25;
        attention.dropout_seed = 3;
        CHECK(strobe_dropout_mask(&attention, &mask, NULL) == STROBE_OK);
        for (int n = 0; n < B * H * SQ * SK; ++n) kept += keep[n];
        CHECK(kept > 0.5 * B * H * SQ * SK && kept < B * H * SQ * SK);
        attention.dropout_p = 0;
    }

    {
        strobe_tensor outs[2], lses[2];
        const double before = ((float *)forward.lse.data)[0];
        outs[0] = outs[1] = forward.out;
        lses[0] = lses[1] = forward.lse;
        forward.out = tensor(4, q_shape);
        forward.lse = tensor(3, lse_shape);
        CHECK(strobe_lse_merge(2, outs, lses, &forward.out, &forward.lse, NULL) == STROBE_OK);
        CHECK(fabs(((float *)forward.lse.data)[0] - before - log(2.0)) < 1e-5);
        CHECK(fabs(((float *)forward.out.data)[5] - ((float *)outs[0].data)[5]) < 1e-6);
    }

    attention.softcap = -1;
    CHECK(strobe_attention_forward(&attention, &forward, NULL) == STROBE_INVALID_ARGUMENT);
    CHECK(strstr(strobe_last_error(), "softcap: is -1") != NULL);
    CHECK(strobe_version()[0] != '\0');
    CHECK(strobe_implementation(0) != NULL);
    CHECK(strobe_num_threads() >= 1);
    CHECK(strobe_set_num_threads(2) == STROBE_OK);
    CHECK(strobe_num_threads() == 2);

    printf(failures ? "%d checks failed\n" : "passed\n", failures);
    return failures != 0;
}
