// Matrix products as the plain sums that they are, in the place of cuBLASLt. Epilogues are computed from the same
// description, so the operators that describe products are tested.
#include <cblas.h>
#include <cuda_bf16.h>

#include <cmath>
#include <vector>

#include "gpt/ops/cuda/gemm.hpp"

namespace strobe::gpt::cuda {

namespace {

using Epilogue = GemmCall::Epilogue;

float read(Buffer b, int64_t i) {
    if (b.precision == Precision::fp32) return static_cast<const float*>(b.data)[i];
    return __bfloat162float(static_cast<const __nv_bfloat16*>(b.data)[i]);
}
void write(Buffer b, int64_t i, float x) {
    if (b.precision == Precision::fp32)
        static_cast<float*>(b.data)[i] = x;
    else
        static_cast<__nv_bfloat16*>(b.data)[i] = __float2bfloat16(x);
}

double gelu(double x) { return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_slope(double x) {
    constexpr double kStep = 1e-5;
    return (gelu(x + kStep) - gelu(x - kStep)) / (2.0 * kStep);
}

}  // namespace

struct Gemm::Library {};
struct Gemm::Plan {};

Gemm::Gemm(void* stream, const std::string&) : stream_(stream) {}
Gemm::~Gemm() = default;
std::string Gemm::version() const { return "emulated"; }
// bf16 products take their epilogues along, as on a GPU; those of fp32 have operators behind them.
bool Gemm::possible(const GemmCall&) { return true; }
float Gemm::milliseconds(const GemmCall&) { return 0.0f; }
std::vector<Gemm::Measured> Gemm::measured() const { return {}; }

void Gemm::run(const GemmCall& c) {
    const auto widened = [](Buffer b, int64_t count) {
        std::vector<float> x(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) x[static_cast<size_t>(i)] = read(b, i);
        return x;
    };
    const auto as_int = [](int64_t n) { return static_cast<int>(n); };
    const std::vector<float> a = widened(c.a, c.lda * (c.transpose_a ? c.m : c.k));
    const std::vector<float> b = widened(c.b, c.ldb * (c.transpose_b ? c.k : c.n));
    std::vector<float> product(static_cast<size_t>(c.m * c.n));
    cblas_sgemm(CblasColMajor, c.transpose_a ? CblasTrans : CblasNoTrans, c.transpose_b ? CblasTrans : CblasNoTrans,
                as_int(c.m), as_int(c.n), as_int(c.k), 1.0f, a.data(), as_int(c.lda), b.data(), as_int(c.ldb), 0.0f,
                product.data(), as_int(c.m));
    const Buffer bias(c.bias, c.d.precision), aux(c.aux, c.d.precision);
    for (int64_t j = 0; j < c.n; ++j) {
        for (int64_t i = 0; i < c.m; ++i) {
            const int64_t at = i + j * c.ldd;
            double x = product[static_cast<size_t>(i + j * c.m)];
            if (c.accumulate) x += read(c.c ? c.c : c.d, at);
            if (c.epilogue == Epilogue::bias || c.epilogue == Epilogue::gelu_aux_bias) x += read(bias, i);
            if (c.epilogue == Epilogue::gelu_aux || c.epilogue == Epilogue::gelu_aux_bias) {
                write(aux, at, static_cast<float>(x));
                x = gelu(x);
            }
            if (c.epilogue == Epilogue::dgelu) x *= gelu_slope(read(aux, at));
            write(c.d, at, static_cast<float>(x));
        }
        if (c.epilogue != Epilogue::sum_b) continue;
        double sum = 0.0;
        for (int64_t p = 0; p < c.k; ++p) sum += b[static_cast<size_t>(c.transpose_b ? j + p * c.ldb : p + j * c.ldb)];
        write(bias, j, static_cast<float>(sum));
    }
}

}  // namespace strobe::gpt::cuda
