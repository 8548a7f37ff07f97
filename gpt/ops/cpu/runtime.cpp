#include "gpt/runtime.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#include "gpt/arena.hpp"
#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt {

namespace {

class HostStage final : public InputStage {
public:
    explicit HostStage(size_t bytes) : memory_(bytes) {}
    std::byte* host() override { return memory_.at<std::byte>(0); }
    std::byte* send(size_t) override { return host(); }

private:
    Arena memory_;
};

class HostRuntime final : public Runtime {
public:
    std::byte* allocate(size_t bytes) override { return host_memory().allocate(bytes); }
    void release(std::byte* data) noexcept override { host_memory().release(data); }
    void copy(void* to, const void* from, size_t bytes) override { host_memory().copy(to, from, bytes); }
    void put(void* to, const void* from, size_t bytes) override { host_memory().put(to, from, bytes); }
    void zero(void* data, size_t bytes) override { host_memory().zero(data, bytes); }
    bool on_host() const override { return true; }

    std::unique_ptr<InputStage> make_stage(size_t bytes) override { return std::make_unique<HostStage>(bytes); }
    void synchronize() override {}
    std::unique_ptr<Recording> record(const std::function<void()>&) override { return nullptr; }
    void equip(Exec& exec) override {
        exec.ops = &cpu::table();
        exec.parts = exec.team->size();
    }
    void collect(OpTimes&) override {}

    double peak_flops(Exec& exec, Precision) override {
        constexpr int64_t kSize = 1024;
        constexpr int kRepeats = 6;
        std::vector<float> x(kSize * kSize), w(kSize * kSize), y(kSize * kSize);
        for (size_t i = 0; i < x.size(); ++i) x[i] = w[i] = 1e-3f * static_cast<float>(i % 997);
        const LinearForward product{.rows = kSize, .in = kSize, .out = kSize, .x = x.data(), .weight = w.data(), .bias = {},
                                    .y = y.data()};
        double best = 1e30;
        for (int i = 0; i < kRepeats; ++i) {
            const auto start = std::chrono::steady_clock::now();
            exec.ops->linear_forward(exec, product);
            best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        return detail::gemm_flops(kSize, kSize, kSize) / best;
    }
    std::string name() override { return "cpu"; }
    size_t total_bytes() override { return 0; }
    size_t free_bytes() override { return 0; }
};

}  // namespace

std::unique_ptr<Runtime> make_host_runtime() { return std::make_unique<HostRuntime>(); }

}  // namespace strobe::gpt
