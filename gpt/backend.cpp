#include "gpt/backend.hpp"

#include <algorithm>
#include <chrono>

namespace strobe::gpt {

Backend::Backend(Device device, int threads) : team_(threads) {
    exec_.device = device;
    exec_.ops = &ops_for(device);
    exec_.team = &team_;
    exec_.times = &times_;
}

void Backend::reserve_scratch(size_t bytes) {
    if (bytes <= exec_.scratch_bytes) return;
    scratch_ = Arena(bytes);
    exec_.scratch = scratch_.at<void>(0);
    exec_.scratch_bytes = bytes;
}

double Backend::measure_peak() {
    constexpr int64_t kSize = 1024;
    constexpr int kRepeats = 6;
    ArenaPlan plan;
    const size_t x = plan.reserve(kSize * kSize), w = plan.reserve(kSize * kSize), y = plan.reserve(kSize * kSize);
    const Arena arena(plan.total_bytes());
    for (int64_t i = 0; i < kSize * kSize; ++i) arena.at<float>(x)[i] = arena.at<float>(w)[i] = 1e-3f * static_cast<float>(i % 997);
    const LinearForward product{.rows = kSize, .in = kSize, .out = kSize, .x = arena.at<float>(x),
                                .weight = arena.at<float>(w), .bias = {}, .y = arena.at<float>(y)};
    double best = 1e30;
    for (int i = 0; i < kRepeats; ++i) {
        const auto start = std::chrono::steady_clock::now();
        exec_.ops->linear_forward(exec_, product);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return detail::gemm_flops(kSize, kSize, kSize) / best;
}

}  // namespace strobe::gpt
