// Times every compiled kernel row by itself, whichever the planner would pick: the tool for choosing the rows of
// src/variants.def. TFLOP/s by the FlashAttention papers' formula on their grid: 16k tokens, hidden size 2048.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <regex>
#include <vector>

#include "core/numeric.hpp"
#include "cuda/device.hpp"
#include "cuda/select.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/variant_table.hpp"

namespace strobe::gpu_tests {
namespace {

using cuda::LaunchContext;
using cuda::VariantRow;

struct Options {
    std::string filter;
    std::vector<int64_t> seqlens{512, 1024, 2048, 4096, 8192, 16384};
    int repeats = 7;
    std::string masks = "full,causal";
    std::string feature = "none";
    bool deterministic = false;
    bool list = false;
};

constexpr int64_t kTokens = 16384;
constexpr int kHidden = 2048;
constexpr int64_t kFlushBytes = 160ll << 20;

class Buffer {
public:
    explicit Buffer(size_t bytes) { cuda::check(cudaMalloc(&data_, std::max<size_t>(bytes, 256)), "cudaMalloc"); }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* data() const { return data_; }

private:
    void* data_ = nullptr;
};

std::vector<uint16_t> normal_numbers(DType dtype, size_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> pool(1 << 16);
    for (float& x : pool) x = normal(engine);
    std::vector<uint16_t> out(count);
    for (size_t i = 0; i < count; ++i) {
        const float x = pool[engine() & 0xFFFF];
        out[i] = dtype == DType::bf16 ? to_bf16(x).bits : to_f16(x).bits;
    }
    return out;
}

struct Tensors {
    Buffer q, k, v, out, dout, dq, dk, dv, lse, flush, workspace, slopes, bias;

    static constexpr size_t kElements = static_cast<size_t>(kTokens) * kHidden;
    static constexpr size_t kWorkspace = kElements * 4 + (64ll << 20);

    explicit Tensors(DType dtype, bool bias_wanted)
        : q(kElements * 2), k(kElements * 2), v(kElements * 2), out(kElements * 2), dout(kElements * 2), dq(kElements * 2),
          dk(kElements * 2), dv(kElements * 2), lse(kTokens * 64 * 4), flush(kFlushBytes), workspace(kWorkspace), slopes(4096),
          bias(bias_wanted ? (2ll << 30) : 256) {
        unsigned seed = 1;
        for (Buffer* b : {&q, &k, &v, &dout}) {
            const std::vector<uint16_t> numbers = normal_numbers(dtype, kElements, seed++);
            cuda::check(cudaMemcpy(b->data(), numbers.data(), kElements * 2, cudaMemcpyHostToDevice), "upload");
        }
        const std::vector<float> slope(1024, 0.01f);
        cuda::check(cudaMemcpy(slopes.data(), slope.data(), 4096, cudaMemcpyHostToDevice), "upload");
        if (bias_wanted) cuda::check(cudaMemset(bias.data(), 0, 2ll << 30), "cudaMemset");
    }
};

BackwardParams make_params(const Tensors& t, const Variant& v, int64_t seqlen, bool causal, const Options& options) {
    BackwardParams p;
    p.size = {static_cast<int>(kTokens / seqlen), kHidden / v.head_dim, kHidden / v.head_dim, v.head_dim, v.head_dim,
              seqlen, seqlen, kTokens, kTokens};
    const int heads = p.size.num_heads;
    p.mask.window_right = causal ? 0 : -1;
    p.score.softmax_scale = 1.0f / std::sqrt(static_cast<float>(v.head_dim));
    if (options.feature == "softcap") p.score.softcap = 30.0f;
    if (options.feature == "alibi") p.score.alibi_slopes = static_cast<const float*>(t.slopes.data());
    if (options.feature == "dropout") p.dropout = {7, 1, 11141, 65536.0f / (65536 - 11141)};
    if (options.feature == "bias") {
        // (1, heads, seqlen, seqlen) as far as 2 GiB go, else one for all heads.
        const bool per_head = heads * seqlen * seqlen * 2 <= (2ll << 30);
        p.score.bias = {t.bias.data(), 0, per_head ? seqlen * seqlen : 0, seqlen, 1};
        p.bias_dtype = v.dtype;
    }
    p.dtype = p.out_dtype = p.grad_dtype = v.dtype;
    const auto tensor = [&](const Buffer& b) {
        return TensorRef{b.data(), seqlen * heads * v.head_dim, static_cast<int64_t>(heads) * v.head_dim, v.head_dim};
    };
    p.q = tensor(t.q), p.k = tensor(t.k), p.v = tensor(t.v), p.out = tensor(t.out), p.dout = tensor(t.dout);
    p.dq = tensor(t.dq), p.dk = tensor(t.dk), p.dv = tensor(t.dv);
    p.lse = {static_cast<float*>(t.lse.data()), heads * seqlen, seqlen};
    p.deterministic = options.deterministic;
    p.workspace = t.workspace.data();
    return p;
}

ForwardParams forward_part(const BackwardParams& p) {
    ForwardParams f;
    static_cast<AttentionParams&>(f) = p;
    f.workspace = p.workspace;
    return f;
}

template <class Launch>
double median_ms(const Options& options, const Tensors& t, Launch launch) {
    cudaEvent_t start, stop;
    cuda::check(cudaEventCreate(&start), "event");
    cuda::check(cudaEventCreate(&stop), "event");
    std::vector<float> times;
    for (int i = 0; i < options.repeats + 2; ++i) {
        cuda::check(cudaMemsetAsync(t.flush.data(), i, kFlushBytes), "flush");
        cuda::check(cudaEventRecord(start), "event");
        cuda::check(launch(), "launch");
        cuda::check(cudaEventRecord(stop), "event");
        cuda::check(cudaEventSynchronize(stop), "run");
        float ms = 0;
        cuda::check(cudaEventElapsedTime(&ms, start, stop), "event");
        if (i >= 2) times.push_back(ms);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

/// The kernel features that --feature asks of a row.
Features features_for(const std::string& feature) {
    if (feature == "none") return Features::plain;
    return feature == "bias" ? Features::tiled : feature == "dropout" ? Features::dropout : Features::general;
}

const VariantRow* forward_for(const Variant& v, Features features) {
    const VariantRow* found = nullptr;
    for (const VariantRow& r : cuda::variant_rows()) {
        const bool fits = r.forward && r.variant.dtype == v.dtype && r.variant.head_dim == v.head_dim &&
                          r.variant.mask == MaskClass::band && r.variant.features >= features;
        if (fits && !found) found = &r;
    }
    return found;
}

/// The rows of this build with the shared memory that a CTA of the sm80 ones asks for; needs no GPU.
int list_rows() {
    for (const VariantRow& row : cuda::variant_rows()) {
        const int bytes = cuda::smem_bytes(row.variant);
        std::printf("%-62s %s\n", cuda::to_string(row.variant).c_str(), bytes > 0 ? fmt::format("{} bytes", bytes).c_str() : "");
    }
    return 0;
}

int run(const Options& options) {
    if (options.list) return list_rows();
    std::printf("%s\n", cuda::device_info(0).name.c_str());
    const std::regex wanted(options.filter);
    const LaunchContext context{nullptr, 0, cuda::device_limits(0).num_sms};
    for (DType dtype : {DType::bf16, DType::f16}) {
        std::unique_ptr<Tensors> tensors;
        for (const VariantRow& row : cuda::variant_rows()) {
            const Variant& v = row.variant;
            const std::string name = cuda::to_string(v);
            if (v.dtype != dtype || !std::regex_search(name, wanted)) continue;
            if (v.arch == Arch::sm80 && cuda::smem_bytes(v) > cuda::device_limits(0).smem_per_cta) continue;
            const bool serves = v.features == features_for(options.feature) || (options.feature == "bias" && v.features == Features::biased) ||
                                (options.feature == "softcap" && v.features == Features::capped);
            if (options.feature != "none" && !serves) continue;
            if (!tensors) tensors = std::make_unique<Tensors>(dtype, options.feature == "bias");
            for (bool causal : {false, true}) {
                if (options.masks.find(causal ? "causal" : "full") == std::string::npos) continue;
                if (causal && v.mask == MaskClass::full) continue;
                std::string line = fmt::format("{:62} {:6}", name, causal ? "causal" : "full");
                for (int64_t seqlen : options.seqlens) {
                    const BackwardParams p = make_params(*tensors, v, seqlen, causal, options);
                    const ForwardParams f = forward_part(p);
                    double flops = 4.0 * kTokens * seqlen * kHidden / (causal ? 2 : 1);
                    double ms = 0;
                    if (row.forward) {
                        ms = median_ms(options, *tensors, [&] { return row.forward(f, context); });
                    } else {
                        if (const VariantRow* fwd = forward_for(v, features_for(options.feature))) {
                            cuda::check(fwd->forward(f, context), "forward");
                        }
                        flops *= 2.5;
                        ms = median_ms(options, *tensors, [&] { return row.backward(p, context); });
                    }
                    line += fmt::format(" {:6.0f}", flops / ms * 1e-9);
                }
                std::printf("%s\n", line.c_str());
                std::fflush(stdout);
            }
        }
    }
    return 0;
}

}  // namespace
}  // namespace strobe::gpu_tests

int main(int argc, char** argv) {
    CLI::App app{"Times every compiled kernel row on the grid of the FlashAttention papers, in TFLOP/s"};
    strobe::gpu_tests::Options options;
    app.add_option("--filter", options.filter, "regular expression on row names");
    app.add_option("--seqlens", options.seqlens, "sequence lengths")->delimiter(',');
    app.add_option("--repeats", options.repeats, "timed runs, of which the median counts")->capture_default_str();
    app.add_option("--masks", options.masks, "full, causal or both")->capture_default_str();
    app.add_option("--feature", options.feature, "softcap, alibi: general rows, and those of a softcap; dropout, bias: rows of their own; none: all rows");
    app.add_flag("--list", options.list, "print the rows and stop");
    app.add_flag("--deterministic", options.deterministic, "the backward's deterministic mode");
    CLI11_PARSE(app, argc, argv);
    try {
        return strobe::gpu_tests::run(options);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "row_bench: %s\n", e.what());
        return 2;
    }
}
