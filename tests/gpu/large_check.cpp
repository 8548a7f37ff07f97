// A sequence of 64k tokens, forward and backward: right on sampled rows, and with memory linear in its length.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

#include "core/numeric.hpp"
#include "cuda/device.hpp"
#include "device_problem.hpp"
#include "parts.hpp"

namespace strobe::gpu_tests {
namespace {

constexpr int64_t kHeads = 4, kDim = 128;

/// (1, S, heads, dim) bf16 on the host and on the device.
struct Rows {
    std::vector<uint16_t> host;
    DeviceBuffer device;

    explicit Rows(int64_t seqlen) : host(static_cast<size_t>(seqlen * kHeads * kDim)), device(host.size() * 2) {}
    void fill(unsigned seed) {
        std::mt19937 engine(seed);
        std::normal_distribution<float> normal;
        std::vector<uint16_t> pool(1 << 16);
        for (uint16_t& x : pool) x = to_bf16(normal(engine)).bits;
        for (uint16_t& x : host) x = pool[engine() & 0xFFFF];
        cuda::check(cudaMemcpy(device.data(), host.data(), device.bytes(), cudaMemcpyHostToDevice), "copy to the device");
    }
    void download() {
        cuda::check(cudaMemcpy(host.data(), device.data(), device.bytes(), cudaMemcpyDeviceToHost), "copy from the device");
    }
    Tensor view(int64_t seqlen) const {
        const int64_t shape[] = {1, seqlen, kHeads, kDim};
        return {device.data(), DType::bf16, shape, {}, {DeviceType::cuda, 0}};
    }
    double at(int64_t row, int64_t head, int64_t d) const {
        return to_float(Bf16{host[static_cast<size_t>((row * kHeads + head) * kDim + d)]});
    }
    double dot(int64_t row, const Rows& other, int64_t other_row, int64_t head) const {
        double sum = 0;
        for (int64_t d = 0; d < kDim; ++d) sum += at(row, head, d) * other.at(other_row, head, d);
        return sum;
    }
};

struct Largest {
    double error = 0, value = 0;
    void add(double ours, double truth) {
        const double e = std::abs(ours - truth);
        error = std::isnan(e) ? INFINITY : std::max(error, e);
        value = std::max(value, std::abs(truth));
    }
    double relative() const { return error / value; }
};

struct Problem {
    int64_t seqlen;
    bool causal;
    Rows q, k, v, out, dout, dq, dk, dv;
    DeviceBuffer lse;
    std::vector<float> lse_host;
    Attention attention;
    Forward forward_call;
    Backward backward_call;

    Problem(int64_t s, bool is_causal, const std::string& implementation)
        : seqlen(s), causal(is_causal), q(s), k(s), v(s), out(s), dout(s), dq(s), dk(s), dv(s),
          lse(static_cast<size_t>(s * kHeads) * 4), lse_host(static_cast<size_t>(s * kHeads)) {
        const int64_t lse_shape[] = {1, kHeads, s};
        const Tensor lse_view(lse.data(), DType::f32, lse_shape, {}, {DeviceType::cuda, 0});
        attention = {.q = q.view(s), .k = k.view(s), .v = v.view(s)};
        attention.causal = causal;
        attention.implementation = implementation.empty() ? nullptr : implementation.c_str();
        forward_call = {.out = out.view(s), .lse = lse_view};
        backward_call.out = out.view(s);
        backward_call.lse = lse_view;
        backward_call.dout = dout.view(s);
        backward_call.dq = dq.view(s);
        backward_call.dk = dk.view(s);
        backward_call.dv = dv.view(s);
    }
    size_t workspace_bytes() const {
        return plan(attention, forward_call).workspace_bytes + plan(attention, backward_call).workspace_bytes;
    }
    double score(int64_t i, int64_t j, int64_t head) const {
        return causal && j > i ? -INFINITY : q.dot(i, k, j, head) / std::sqrt(static_cast<double>(kDim));
    }
    double lse_at(int64_t i, int64_t head) const { return lse_host[static_cast<size_t>(head * seqlen + i)]; }
};

/// out, lse and dq of one row and dk, dv of one key, from the definition.
void compare(const Problem& p, int64_t row, int64_t head, Largest (&found)[5]) {
    double largest = -INFINITY, sum = 0;
    std::vector<double> s(static_cast<size_t>(p.seqlen));
    for (int64_t j = 0; j < p.seqlen; ++j) largest = std::max(largest, s[static_cast<size_t>(j)] = p.score(row, j, head));
    for (double& x : s) sum += x = std::exp(x - largest);
    std::vector<double> out(kDim), dq(kDim), dk(kDim), dv(kDim);
    const double delta = p.dout.dot(row, p.out, row, head), scale = 1 / std::sqrt(static_cast<double>(kDim));
    for (int64_t j = 0; j < p.seqlen; ++j) {
        const double probability = s[static_cast<size_t>(j)] / sum;
        if (probability == 0) continue;
        const double ds = probability * (p.dout.dot(row, p.v, j, head) - delta);
        for (int64_t d = 0; d < kDim; ++d) {
            out[static_cast<size_t>(d)] += probability * p.v.at(j, head, d);
            dq[static_cast<size_t>(d)] += scale * ds * p.k.at(j, head, d);
        }
    }
    for (int64_t i = 0; i < p.seqlen; ++i) {  // `row` as a key
        const double probability = std::exp(p.score(i, row, head) - p.lse_at(i, head));
        if (probability == 0) continue;
        const double ds = probability * (p.dout.dot(i, p.v, row, head) - p.dout.dot(i, p.out, i, head));
        for (int64_t d = 0; d < kDim; ++d) {
            dv[static_cast<size_t>(d)] += probability * p.dout.at(i, head, d);
            dk[static_cast<size_t>(d)] += scale * ds * p.q.at(i, head, d);
        }
    }
    found[0].add(p.lse_at(row, head), largest + std::log(sum));
    for (int64_t d = 0; d < kDim; ++d) {
        const auto n = static_cast<size_t>(d);
        found[1].add(p.out.at(row, head, d), out[n]);
        found[2].add(p.dq.at(row, head, d), dq[n]);
        found[3].add(p.dk.at(row, head, d), dk[n]);
        found[4].add(p.dv.at(row, head, d), dv[n]);
    }
}

double milliseconds(const std::function<void()>& work) {
    cudaEvent_t begin = nullptr, end = nullptr;
    cuda::check(cudaEventCreate(&begin), "event");
    cuda::check(cudaEventCreate(&end), "event");
    cuda::check(cudaEventRecord(begin), "event");
    work();
    cuda::check(cudaEventRecord(end), "event");
    cuda::check(cudaEventSynchronize(end), "run");
    float ms = 0;
    cuda::check(cudaEventElapsedTime(&ms, begin, end), "event");
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return ms;
}

}  // namespace

Finding check_large(const Options& options) {
    Finding finding;
    for (bool causal : {false, true}) {
        Problem p(options.large_seqlen, causal, options.implementation);
        unsigned seed = 1;
        for (Rows* rows : {&p.q, &p.k, &p.v, &p.dout}) rows->fill(seed++);
        const size_t forward_bytes = plan(p.attention, p.forward_call).workspace_bytes;
        const size_t backward_bytes = plan(p.attention, p.backward_call).workspace_bytes;
        const DeviceBuffer forward_workspace(forward_bytes), backward_workspace(backward_bytes);
        p.forward_call.workspace = {forward_workspace.data(), forward_bytes};
        p.backward_call.workspace = {backward_workspace.data(), backward_bytes};
        double ms = 0;
        for (int run = 0; run < 2; ++run) {
            ms = milliseconds([&] {
                forward(p.attention, p.forward_call);
                backward(p.attention, p.backward_call);
            });
        }
        for (Rows* rows : {&p.out, &p.dq, &p.dk, &p.dv}) rows->download();
        cuda::check(cudaMemcpy(p.lse_host.data(), p.lse.data(), p.lse.bytes(), cudaMemcpyDeviceToHost), "copy from the device");

        double worst[5] = {};
        for (int64_t row : {int64_t{1}, p.seqlen / 5 + 3, p.seqlen - 1}) {
            Largest found[5];
            compare(p, row, row % kHeads, found);
            for (int n = 0; n < 5; ++n) worst[n] = std::max(worst[n], found[n].relative());
        }
        // Rounding to bf16 leaves 2^-9 of each probability and of dS; what is asked is a few of these.
        constexpr double kBounds[5] = {1e-5, 0.02, 0.02, 0.02, 0.02};
        constexpr const char* kNames[5] = {"lse", "out", "dq", "dk", "dv"};
        Json& json = finding.json[causal ? "causal" : "full"];
        for (int n = 0; n < 5; ++n) {
            json["error_over_largest"][kNames[n]] = worst[n];
            if (!(worst[n] <= kBounds[n])) {
                finding.fail(fmt::format("{}, {} tokens: {}: error is {:.2g} of the row's largest value", causal ? "causal" : "full",
                                         p.seqlen, kNames[n], worst[n]));
            }
        }
        const double pairs = static_cast<double>(p.seqlen) * static_cast<double>(p.seqlen) / (causal ? 2 : 1);
        json["implementation"] = plan(p.attention, p.forward_call).implementation + " / " + plan(p.attention, p.backward_call).implementation;
        json["milliseconds_forward_and_backward"] = ms;
        json["tflops"] = 3.5 * 4 * pairs * kHeads * kDim / ms * 1e-9;
        json["tensor_bytes"] = 8 * p.q.device.bytes() + p.lse.bytes();
        json["workspace_bytes"] = forward_bytes + backward_bytes;
        json["score_matrix_bytes_not_needed"] = 2 * kHeads * p.seqlen * p.seqlen;

        // Twice the tokens may take twice the workspace and no more.
        const size_t half = Problem(p.seqlen / 2, causal, options.implementation).workspace_bytes();
        json["workspace_bytes_of_half_the_tokens"] = half;
        if (forward_bytes + backward_bytes > 2 * half + 4096) finding.fail("the workspace grows faster than the sequence");
    }
    finding.json["tokens"] = options.large_seqlen;
    finding.json["heads"] = kHeads;
    finding.json["head_dim"] = kDim;
    return finding;
}

}  // namespace strobe::gpu_tests
