// Bytes per second of the trainer's norms on a GPU, by themselves and in turn with the device's own copy of as many
// bytes in one process: what the marks around a step's operators cannot tell from their own time. LayerNorm where
// nothing else is said. Prints JSON.
//   norm_bandwidth [ROWS] [HIDDEN...]
// Build: g++ -std=c++20 -O2 -I. -Iinclude -Isrc -I/usr/local/cuda/include bench/dev/norm_bandwidth.cpp
// and the objects of gpt/ops/cuda/norm.cu and reduce.cu, -lcudart_static -ldl -lrt -lpthread.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpt/bf16.hpp"
#include "gpt/ops/cuda/kernels.hpp"

namespace {

using namespace strobe::gpt;

constexpr int kSets = 4;        // of tensors, each larger than the cache of the second level, used in turn
constexpr int kCallsInARun = 8;  // between two marks
constexpr int kRuns = 40;

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

/// Memory of numbers that look like activations.
struct Tensor {
    void* data = nullptr;
    explicit Tensor(size_t bytes) {
        static const std::vector<uint16_t> numbers = [] {
            std::mt19937 engine(1);
            std::normal_distribution<float> normal;
            std::vector<uint16_t> bits(1 << 20);
            for (uint16_t& b : bits) b = round_bf16(normal(engine));
            return bits;
        }();
        check(cudaMalloc(&data, bytes));
        const size_t whole = numbers.size() * sizeof(uint16_t);
        for (size_t at = 0; at < bytes; at += whole) {
            const size_t count = std::min(whole, bytes - at);
            check(cudaMemcpy(static_cast<char*>(data) + at, numbers.data(), count, cudaMemcpyHostToDevice));
        }
    }
    ~Tensor() { cudaFree(data); }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    Buffer bf16() const { return {data, Precision::bf16}; }
    Buffer fp32() const { return {data, Precision::fp32}; }
    float* floats() const { return static_cast<float*>(data); }
};

struct Contender {
    std::string name;
    double bytes;  // of tensors, read and written
    std::function<void(int set)> call;
    std::vector<double> seconds{};
};

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

void measure(int64_t rows, int64_t hidden, int num_sms, const char* comma) {
    const size_t tensor = static_cast<size_t>(rows * hidden) * 2;
    std::vector<std::unique_ptr<Tensor>> memory;
    const auto make = [&](size_t bytes) { return memory.emplace_back(std::make_unique<Tensor>(bytes)).get(); };
    Tensor *x[kSets], *branch[kSets], *sum[kSets], *out[kSets], *dout[kSets], *dx[kSets];
    for (int s = 0; s < kSets; ++s) {
        for (Tensor** t : {&x[s], &branch[s], &sum[s], &out[s], &dout[s], &dx[s]}) *t = make(tensor);
    }
    Exec e{.device = Device::cuda, .parts = 2 * num_sms};
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    e.stream = stream;
    e.scratch_bytes = norm_scratch_bytes(e.parts, hidden);
    e.scratch = make(e.scratch_bytes)->data;
    const size_t vector = static_cast<size_t>(hidden) * 4, statistics = static_cast<size_t>(rows) * 4;
    Tensor *const weight = make(vector), *const bias = make(vector);
    Tensor *const dweight = make(vector), *const dbias = make(vector), *const dsum = make(vector);
    Tensor *const mean = make(statistics), *const rstd = make(statistics);
    for (const Tensor* t : {dweight, dbias, dsum}) check(cudaMemset(t->data, 0, vector));
    for (const Tensor* t : {mean, rstd}) check(cudaMemset(t->data, 0, statistics));

    const auto forward = [&](int s, NormKind kind, bool residual) {
        const bool layernorm = kind == NormKind::layernorm;
        NormForward a{.kind = kind, .rows = rows, .hidden = hidden, .eps = 1e-5f, .x = x[s]->bf16(), .branch = {},
                      .sum = {}, .weight = weight->fp32(), .bias = layernorm ? bias->fp32() : Buffer(),
                      .out = out[s]->bf16(), .mean = layernorm ? mean->floats() : nullptr, .rstd = rstd->floats()};
        if (residual) a.branch = branch[s]->bf16(), a.sum = sum[s]->bf16();
        cuda::norm_forward(e, a);
    };
    const auto backward = [&](int s, NormKind kind, bool again) {
        const bool layernorm = kind == NormKind::layernorm;
        NormBackward a{.kind = kind, .rows = rows, .hidden = hidden, .x = x[s]->bf16(), .weight = weight->fp32(),
                       .mean = layernorm ? mean->floats() : nullptr, .rstd = rstd->floats(), .dout = dout[s]->bf16(),
                       .dx = dx[s]->bf16(), .dweight = dweight->floats(),
                       .dbias = layernorm ? dbias->floats() : nullptr};
        if (again) a.out = out[s]->bf16(), a.bias = bias->fp32(), a.dsum = dsum->floats();
        cuda::norm_backward(e, a);
    };
    const auto copy = [&](int s, int tensors) {  // the same bytes: half of them read, half written
        for (int t = 0; t < tensors; ++t) {
            const Tensor* const from[] = {x[s], dout[s]};
            const Tensor* const to[] = {out[s], sum[s]};
            check(cudaMemcpyAsync(to[t]->data, from[t]->data, tensor, cudaMemcpyDeviceToDevice, stream));
        }
    };
    const auto bytes = static_cast<double>(tensor);
    std::vector<Contender> all{
        {"copy", 2 * bytes, [&](int s) { copy(s, 1); }},
        {"forward", 2 * bytes, [&](int s) { forward(s, NormKind::layernorm, false); }},
        {"residual and forward", 4 * bytes, [&](int s) { forward(s, NormKind::layernorm, true); }},
        {"copy of two", 4 * bytes, [&](int s) { copy(s, 2); }},
        {"backward into dx", 4 * bytes, [&](int s) { backward(s, NormKind::layernorm, false); }},
        {"backward into dx, output again, bias gradient", 5 * bytes,
         [&](int s) { backward(s, NormKind::layernorm, true); }},
        {"RMSNorm: residual and forward", 4 * bytes, [&](int s) { forward(s, NormKind::rmsnorm, true); }},
        {"RMSNorm: backward into dx", 4 * bytes, [&](int s) { backward(s, NormKind::rmsnorm, false); }},
    };
    cudaEvent_t begin = nullptr, end = nullptr;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    for (int run = -3; run < kRuns; ++run) {
        for (size_t i = 0; i < all.size(); ++i) {
            Contender& c = all[(i + static_cast<size_t>(run + 3)) % all.size()];
            // The host is ahead by the time the first mark is reached.
            check(cudaMemsetAsync(branch[0]->data, 0, tensor, stream));
            check(cudaEventRecord(begin, stream));
            for (int n = 0; n < kCallsInARun; ++n) c.call(n % kSets);
            check(cudaEventRecord(end, stream));
            check(cudaEventSynchronize(end));
            float ms = 0.0f;
            check(cudaEventElapsedTime(&ms, begin, end));
            if (run >= 0) c.seconds.push_back(1e-3 * ms / kCallsInARun);
        }
    }
    const double copied = all[0].bytes / median(all[0].seconds);
    for (const Contender& c : all) {
        const double rate = c.bytes / median(c.seconds);
        std::printf("%s  {\"rows\": %lld, \"hidden\": %lld, \"what\": \"%s\", \"microseconds\": %.2f, "
                    "\"terabytes_per_second\": %.3f, \"of_the_copy\": %.3f}",
                    &c == all.data() ? comma : ",\n", static_cast<long long>(rows), static_cast<long long>(hidden),
                    c.name.c_str(), 1e6 * median(c.seconds), 1e-12 * rate, rate / copied);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaStreamDestroy(stream);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        cudaDeviceProp properties{};
        check(cudaGetDeviceProperties(&properties, 0));
        const char* const commit = std::getenv("STROBE_COMMIT");
        std::printf("{\"record\": \"norm-bandwidth\", \"commit\": \"%s\", \"gpu\": \"%s\", \"calls_in_a_run\": %d, "
                    "\"runs\": %d, \"rows\": [\n", commit ? commit : "", properties.name, kCallsInARun, kRuns);
        const int64_t rows = argc > 1 ? std::atoll(argv[1]) : 16384;
        std::vector<int64_t> widths;
        for (int i = 2; i < argc; ++i) widths.push_back(std::atoll(argv[i]));
        if (widths.empty()) widths = {768, 1024, 1600, 2048, 2560, 4096, 5120};
        for (size_t i = 0; i < widths.size(); ++i) {
            measure(rows, widths[i], properties.multiProcessorCount, i == 0 ? "" : ",\n");
        }
        std::printf("\n]}\n");
    } catch (const std::exception& error) {
        std::fprintf(stderr, "norm_bandwidth: %s\n", error.what());
        return 1;
    }
}
