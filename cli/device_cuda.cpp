#include "device.hpp"

#include <cuda_runtime.h>
#include <fmt/core.h>

#include <array>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "cuda/device.hpp"
#include "fenced_memory.hpp"

namespace strobe::cli {
namespace {

using cuda::check;

class CudaMemory : public verify::Memory {
public:
    explicit CudaMemory(int device) : device_(device) {}

    void* allocate(size_t bytes) override {
        const cuda::DeviceGuard guard(device_);
        void* data = nullptr;
        check(cudaMalloc(&data, bytes > 0 ? bytes : 1), "cudaMalloc");
        return data;
    }
    void release(void* data) override { cudaFree(data); }
    void upload(void* to, const void* from, size_t bytes) override {
        check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
    }
    void download(void* to, const void* from, size_t bytes) override {
        check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
    }

private:
    int device_;
};

struct EventDeleter {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<CUevent_st, EventDeleter>;

Event make_event() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "cudaEventCreate");
    return Event(event);
}

/// Answers of nvidia-smi about one device, such as clocks.sm; "" where it does not answer.
std::string smi(const std::string& fields, int device) {
    const std::string command =
        fmt::format("nvidia-smi --query-gpu={} --format=csv,noheader -i {} 2>/dev/null", fields, device);
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> pipe(popen(command.c_str(), "r"), pclose);
    if (!pipe) return "";
    std::array<char, 512> line{};
    std::string text = std::fgets(line.data(), line.size(), pipe.get()) ? line.data() : "";
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
    return text;
}

}  // namespace

int cuda_device_count(std::string* reason) { return cuda::device_count(reason); }

namespace {

template <class MemoryKind>
verify::Memory& memory_of(const Device& device) {
    if (device.type == DeviceType::cpu) return verify::host_memory();
    static std::vector<std::unique_ptr<MemoryKind>> memories = [] {
        std::vector<std::unique_ptr<MemoryKind>> list;
        for (int d = 0; d < cuda::device_count(); ++d) list.push_back(std::make_unique<MemoryKind>(d));
        return list;
    }();
    return *memories.at(static_cast<size_t>(device.index));
}

}  // namespace

verify::Memory& device_memory(const Device& device) { return memory_of<CudaMemory>(device); }

verify::Memory& fenced_memory(const Device& device) { return memory_of<FencedMemory>(device); }

std::vector<double> time_on_device(const Device& device, int repeats, const std::function<void()>& work) {
    const cuda::DeviceGuard guard(device.index);
    const size_t flush_bytes = 2 * cuda::device_info(device.index).l2_bytes;
    verify::Memory& memory = device_memory(device);
    const std::unique_ptr<void, std::function<void(void*)>> flush(memory.allocate(flush_bytes),
                                                                  [&](void* data) { memory.release(data); });
    std::vector<Event> begin, end;
    for (int i = 0; i < repeats; ++i) {
        begin.push_back(make_event());
        end.push_back(make_event());
        check(cudaMemsetAsync(flush.get(), i, flush_bytes, nullptr), "cudaMemset");
        check(cudaEventRecord(begin.back().get(), nullptr), "cudaEventRecord");
        work();
        check(cudaEventRecord(end.back().get(), nullptr), "cudaEventRecord");
    }
    check(cudaDeviceSynchronize(), "waiting for the device");
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin[static_cast<size_t>(i)].get(), end[static_cast<size_t>(i)].get()),
              "cudaEventElapsedTime");
        seconds.push_back(milliseconds * 1e-3);
    }
    return seconds;
}

nlohmann::ordered_json device_json(const Device& device) {
    if (device.type == DeviceType::cpu) return nullptr;
    const cuda::DeviceInfo info = cuda::device_info(device.index);
    return {{"name", info.name},
            {"compute_capability", fmt::format("{}.{}", info.compute_capability / 10, info.compute_capability % 10)},
            {"multiprocessors", info.num_sms},
            {"memory_bytes", info.memory_bytes},
            {"l2_bytes", info.l2_bytes},
            {"cuda_driver", info.driver_version},
            {"cuda_runtime", info.runtime_version},
            {"driver", smi("driver_version", device.index)},
            {"clocks_sm_memory", smi("clocks.sm,clocks.mem", device.index)},
            {"clocks_max_sm_memory", smi("clocks.max.sm,clocks.max.mem", device.index)},
            {"power_limit", smi("power.limit", device.index)},
            {"temperature_c", smi("temperature.gpu", device.index)}};
}

}  // namespace strobe::cli
