// y = x W^T + b and its gradients as cuBLASLt sees them: a row-major (rows, columns) matrix is a column-major (columns,
// rows) one.
#include "gpt/ops/cuda/gemm.hpp"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

using Epilogue = GemmCall::Epilogue;

// What a pointwise operator on its own costs, as memory moves.
constexpr double kPointwiseBytesPerSecond = 2.7e12;

/// Whether the product with something more in its epilogue takes less time than the product, and that behind it in an
/// operator that moves so many bytes. Found out once per shape.
bool fusion_pays(Exec& e, const GemmCall& plain, const GemmCall& fused, double bytes) {
    if (fused.a.precision != Precision::bf16 || fused.ldd % 8 != 0 || !e.gemm->possible(fused)) return false;
    const float with = e.gemm->milliseconds(fused), without = e.gemm->milliseconds(plain);
    if (with == 0.0f || without == 0.0f) return true;
    return with <= without + 1e3 * bytes / kPointwiseBytesPerSecond;
}

double bytes_of(double passes, int64_t rows, int64_t columns, Buffer b) {
    return passes * static_cast<double>(rows * columns) * static_cast<double>(size_of(b.precision));
}

/// dweight, and dbias beside it.
void weight_gradient(Exec& e, const LinearBackward& a, int64_t dy_stride) {
    const GemmCall call{.transpose_b = true, .m = a.in, .n = a.out, .k = a.rows, .lda = a.in, .ldb = dy_stride,
                        .ldd = a.in, .a = a.x, .b = a.dy, .d = a.dweight, .accumulate = !a.overwrite};
    if (!a.dbias) return e.gemm->run(call);
    const int64_t columns = a.dbias_columns > 0 ? a.dbias_columns : a.out;
    GemmCall both = call;
    both.epilogue = Epilogue::sum_b;
    both.bias = e.scratch;
    // The sums come in dweight's precision, and they are fp32.
    if (a.dweight.precision == Precision::fp32 && fusion_pays(e, call, both, bytes_of(1, a.rows, columns, a.dy))) {
        e.gemm->run(both);
        return add_parts(e, static_cast<const float*>(e.scratch), 1, columns, a.out, {{a.dbias}});
    }
    e.gemm->run(call);
    add_column_sums(e, a.dy, a.rows, columns, dy_stride, a.dbias);
}

}  // namespace

void linear_forward(Exec& e, const LinearForward& a) {
    if (is_row_product(a)) return row_product(e, a);
    GemmCall call{.transpose_a = true, .m = a.out, .n = a.rows, .k = a.in, .lda = a.in, .ldb = a.in,
                  .ldd = a.y_stride > 0 ? a.y_stride : a.out, .a = a.weight, .b = a.x, .d = a.y};
    if (a.bias) {
        call.epilogue = Epilogue::bias;
        call.bias = a.bias.data;
    }
    if (a.residual) {
        call.c = a.residual;
        call.accumulate = true;
    }
    if (!a.gelu_input) return e.gemm->run(call);
    GemmCall fused = call;
    fused.epilogue = a.bias ? Epilogue::gelu_aux_bias : Epilogue::gelu_aux;
    fused.aux = a.gelu_input.data;
    call.d = a.gelu_input;
    if (fusion_pays(e, call, fused, bytes_of(2, a.rows, a.out, a.y))) return e.gemm->run(fused);
    e.gemm->run(call);
    activation_forward(e, {.kind = ActivationKind::gelu, .rows = a.rows, .ffn = a.out, .x = a.gelu_input, .y = a.y});
}

void linear_backward(Exec& e, const LinearBackward& a) {
    const int64_t dy_stride = a.dy_stride > 0 ? a.dy_stride : a.out;
    if (a.dweight) weight_gradient(e, a, dy_stride);
    if (!a.dx) return;
    const GemmCall call{.m = a.in, .n = a.rows, .k = a.out, .lda = a.in, .ldb = dy_stride, .ldd = a.in, .a = a.weight,
                        .b = a.dy, .d = a.dx};
    if (!a.gelu_input) return e.gemm->run(call);
    GemmCall fused = call;
    fused.epilogue = Epilogue::dgelu;
    fused.aux = a.gelu_input.data;
    if (fusion_pays(e, call, fused, bytes_of(3, a.rows, a.in, a.dx))) return e.gemm->run(fused);
    e.gemm->run(call);
    activation_backward(
        e, {.kind = ActivationKind::gelu, .rows = a.rows, .ffn = a.in, .x = a.gelu_input, .dy = a.dx, .dx = a.dx});
}

}  // namespace strobe::gpt::cuda
