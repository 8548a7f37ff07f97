// Matrix products by OpenBLAS, one single-threaded call per thread of the team: the split is by sizes alone and the
// contraction is never split, so results do not depend on timing.
#include <cblas.h>

#include <algorithm>
#include <stdexcept>

#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt::cpu {

namespace {

constexpr int64_t kRowGrain = 8;      // rows of a GEMM tile
constexpr int64_t kVectorRows = 4;    // up to here a product is bound by reading the weight: one pass of gemv per row

blasint as_int(int64_t n) { return static_cast<blasint>(n); }

void fill_rows(float* y, const float* bias, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(bias, columns, y + r * stride);
}

void sum_rows(Exec& e, const float* dy, int64_t rows, int64_t columns, int64_t stride, float* dbias) {
    e.team->ranges(columns, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = begin; c < end; ++c) dbias[c] += dy[r * stride + c];
    });
}

}  // namespace

void linear_forward(Exec& e, const LinearForward& a) {
    if (a.gelu_input || a.residual) throw std::invalid_argument("linear: the cpu fuses neither gelu nor a residual");
    const int64_t y_stride = a.y_stride > 0 ? a.y_stride : a.out;
    const float* x = a.x.f32();
    const float* weight = a.weight.f32();
    const float* bias = a.bias ? a.bias.f32() : nullptr;
    float* y = a.y.f32();
    const float beta = bias ? 1.0f : 0.0f;
    if (a.rows <= kVectorRows) {
        e.team->ranges(a.out, 16, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = 0; r < a.rows; ++r) {
                float* out = y + r * y_stride + begin;
                if (bias) std::copy_n(bias + begin, end - begin, out);
                cblas_sgemv(CblasRowMajor, CblasNoTrans, as_int(end - begin), as_int(a.in), 1.0f, weight + begin * a.in,
                            as_int(a.in), x + r * a.in, 1, beta, out, 1);
            }
        });
        return;
    }
    e.team->ranges(a.rows, kRowGrain, [&](int64_t begin, int64_t end, int) {
        float* out = y + begin * y_stride;
        if (bias) fill_rows(out, bias, end - begin, a.out, y_stride);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, as_int(end - begin), as_int(a.out), as_int(a.in), 1.0f,
                    x + begin * a.in, as_int(a.in), weight, as_int(a.in), beta, out, as_int(y_stride));
    });
}

void linear_backward(Exec& e, const LinearBackward& a) {
    if (a.gelu_input) throw std::invalid_argument("linear: the cpu does not fuse gelu");
    const int64_t dy_stride = a.dy_stride > 0 ? a.dy_stride : a.out;
    const float* dy = a.dy.f32();
    if (a.dweight) {
        const float* x = a.x.f32();
        float* dweight = a.dweight.f32();
        e.team->ranges(a.out, kRowGrain, [&](int64_t begin, int64_t end, int) {
            cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, as_int(end - begin), as_int(a.in), as_int(a.rows), 1.0f,
                        dy + begin, as_int(dy_stride), x, as_int(a.in), a.overwrite ? 0.0f : 1.0f, dweight + begin * a.in, as_int(a.in));
        });
        if (a.dbias) sum_rows(e, dy, a.rows, a.out, dy_stride, a.dbias);
    }
    if (!a.dx) return;
    const float* weight = a.weight.f32();
    float* dx = a.dx.f32();
    e.team->ranges(a.rows, kRowGrain, [&](int64_t begin, int64_t end, int) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, as_int(end - begin), as_int(a.in), as_int(a.out), 1.0f,
                    dy + begin * dy_stride, as_int(dy_stride), weight, as_int(a.in), 0.0f, dx + begin * a.in, as_int(a.in));
    });
}

}  // namespace strobe::gpt::cpu
