#include "gpt/runtime.hpp"

#include <array>
#include <stdexcept>
#include <vector>

#include <fmt/core.h>

#include "cuda/device.hpp"
#include "gpt/ops/cuda/gemm.hpp"
#include "gpt/ops/cuda/handles.hpp"
#include "gpt/ops/cuda/kernels.hpp"
#include "gpt/ops/cuda/recording.hpp"

namespace strobe::gpt::cuda {

namespace {

Stream make_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return Stream(stream);
}

Event make_event(unsigned flags) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreate");
    return Event(event);
}

PinnedMemory pinned(size_t bytes) {
    void* data = nullptr;
    check(cudaMallocHost(&data, bytes), "pinned memory");
    return PinnedMemory(data);
}

/// Pinned blocks in turn on the host, so that the next batch is written while the last is still on its way; one block
/// on the device, which the stream's order protects.
class DeviceStage final : public InputStage {
public:
    DeviceStage(size_t bytes, Memory& memory, cudaStream_t stream) : device_(bytes, memory), stream_(stream) {
        for (Slot& slot : slots_) {
            slot.data = pinned(bytes);
            slot.sent = make_event(cudaEventDisableTiming);
        }
    }
    std::byte* host() override {
        Slot& slot = slots_[turn_];
        if (slot.pending) check(cudaEventSynchronize(slot.sent.get()), "waiting for a batch to be sent");
        slot.pending = false;
        return static_cast<std::byte*>(slot.data.get());
    }
    std::byte* send(size_t bytes) override {
        Slot& slot = slots_[turn_];
        check(cudaMemcpyAsync(device_.at<void>(0), slot.data.get(), bytes, cudaMemcpyHostToDevice, stream_),
              "sending a batch");
        check(cudaEventRecord(slot.sent.get(), stream_), "cudaEventRecord");
        slot.pending = true;
        turn_ = (turn_ + 1) % slots_.size();
        return device_.at<std::byte>(0);
    }

private:
    struct Slot {
        PinnedMemory data;
        Event sent;
        bool pending = false;
    };
    std::array<Slot, 2> slots_;
    size_t turn_ = 0;
    Arena device_;  // goes first, which waits for what is still on its way
    cudaStream_t stream_;
};

/// A pair of marks per operator, read when somebody asks.
class EventClock final : public OpClock {
public:
    explicit EventClock(cudaStream_t stream) : stream_(stream) {}

    void begin() override {
        if (used_ == marks_.size()) {
            marks_.push_back({make_event(cudaEventDefault), make_event(cudaEventDefault), {}, {}});
        }
        check(cudaEventRecord(marks_[used_].begin.get(), stream_), "cudaEventRecord");
    }
    void end(OpKind kind, const Work& work) override {
        Mark& mark = marks_[used_++];
        check(cudaEventRecord(mark.end.get(), stream_), "cudaEventRecord");
        mark.kind = kind;
        mark.work = work;
    }
    void collect(OpTimes& times) {
        check(cudaStreamSynchronize(stream_), "waiting for the device");
        for (size_t i = 0; i < used_; ++i) {
            float milliseconds = 0.0f;
            check(cudaEventElapsedTime(&milliseconds, marks_[i].begin.get(), marks_[i].end.get()),
                  "cudaEventElapsedTime");
            times.add(marks_[i].kind, 1e-3 * static_cast<double>(milliseconds), marks_[i].work);
        }
        used_ = 0;
    }

private:
    struct Mark {
        Event begin, end;
        OpKind kind;
        Work work;
    };
    cudaStream_t stream_;
    std::vector<Mark> marks_;
    size_t used_ = 0;
};

/// Dense bf16 FLOP/s as the maker states them. Others: multiprocessors * clock * FLOPs per clock.
double stated_bf16_peak(const strobe::cuda::DeviceInfo& info, int clock_khz) {
    const auto named = [&](const char* part) { return info.name.find(part) != std::string::npos; };
    if (named("H100") && named("PCIe")) return 756e12;
    if (named("H100") || named("H200") || named("GH200")) return 989e12;
    if (named("A100")) return 312e12;
    const double per_clock = info.compute_capability >= 90 ? 4096 : info.compute_capability == 80 ? 2048 : 1024;
    return static_cast<double>(info.num_sms) * 1e3 * static_cast<double>(clock_khz) * per_clock;
}

class CudaRuntime final : public Runtime {
public:
    CudaRuntime()
        : device_(current_device()), stream_(make_stream()),
          gemm_(stream_.get(), strobe::cuda::device_info(device_).name), clock_(stream_.get()) {}

    std::byte* allocate(size_t bytes) override {
        void* data = nullptr;
        const cudaError_t status = cudaMalloc(&data, bytes);
        if (status == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            throw std::runtime_error(fmt::format(
                "device cuda: no room for {:.2f} GB: {:.2f} of {:.2f} GB are free; strobe train "
                "--plan tells what a run needs, --recompute and a smaller --batch make it less",
                static_cast<double>(bytes) * 1e-9, static_cast<double>(free_bytes()) * 1e-9,
                static_cast<double>(total_bytes()) * 1e-9));
        }
        check(status, "cudaMalloc");
        zero(data, bytes);
        return static_cast<std::byte*>(data);
    }
    void release(std::byte* data) noexcept override {
        cudaStreamSynchronize(stream_.get());
        cudaFree(data);
    }
    void copy(void* to, const void* from, size_t bytes) override {
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_.get()), "copying memory");
        synchronize();
    }
    void put(void* to, const void* from, size_t bytes) override {
        // Memory that is not pinned: the driver has taken its copy when the call returns.
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_.get()), "sending memory");
    }
    void zero(void* data, size_t bytes) override {
        check(cudaMemsetAsync(data, 0, bytes, stream_.get()), "clearing memory");
    }
    bool on_host() const override { return false; }

    std::unique_ptr<InputStage> make_stage(size_t bytes) override {
        return std::make_unique<DeviceStage>(bytes, *this, stream_.get());
    }
    std::unique_ptr<Recording> record(const std::function<void()>& enqueue) override {
        return cuda::record(stream_.get(), enqueue);
    }
    void synchronize() override { check(cudaStreamSynchronize(stream_.get()), "waiting for the device"); }
    void equip(Exec& exec) override {
        exec.ops = &table();
        exec.stream = stream_.get();
        exec.device_index = device_;
        exec.gemm = &gemm_;
        exec.clock = &clock_;
        exec.parts = 2 * strobe::cuda::device_limits(device_).num_sms;
    }
    void collect(OpTimes& times) override { clock_.collect(times); }
    double peak_flops(Exec&, Precision) override {
        int clock_khz = 0;
        check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, device_), "cudaDeviceGetAttribute");
        return stated_bf16_peak(strobe::cuda::device_info(device_), clock_khz);
    }
    std::string name() override { return strobe::cuda::device_info(device_).name; }
    size_t total_bytes() override { return memory_info().second; }
    size_t free_bytes() override { return memory_info().first; }

private:
    static std::pair<size_t, size_t> memory_info() {
        size_t free = 0, total = 0;
        check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
        return {free, total};
    }

    static int current_device() {
        int device = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        return device;
    }

    int device_;
    Stream stream_;
    Gemm gemm_;
    EventClock clock_;
};

}  // namespace

const Ops& table() {
    static const Ops ops{
        .embedding_forward = embedding_forward, .embedding_backward = embedding_backward, .norm_forward = norm_forward,
        .norm_backward = norm_backward, .linear_forward = linear_forward, .linear_backward = linear_backward,
        .bias_backward = bias_backward,
        .activation_forward = activation_forward, .activation_backward = activation_backward, .rope = rope,
        .attention_forward = attention_forward, .attention_backward = attention_backward, .cache_append = cache_append,
        .cross_entropy = cross_entropy, .loss_sum = loss_sum, .adamw = adamw, .squared_norm = squared_norm,
        .fuses_gelu = true, .fuses_residual = true, .norms_again = true, .avoids_row_sums = true,
        .uses_row_groups = true,
    };
    return ops;
}

std::unique_ptr<Runtime> make_runtime() {
    std::string reason;
    if (strobe::cuda::device_count(&reason) == 0) throw std::invalid_argument("device cuda: " + reason);
    return std::make_unique<CudaRuntime>();
}

}  // namespace strobe::gpt::cuda
