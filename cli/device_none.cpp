// A build without CUDA.
#include <nlohmann/json.hpp>

#include "device.hpp"
#include "exit.hpp"

namespace strobe::cli {

int cuda_device_count(std::string* reason) {
    if (reason) *reason = "this build of strobe has no CUDA kernels";
    return 0;
}

verify::Memory& device_memory(const Device&) { return verify::host_memory(); }

verify::Memory& fenced_memory(const Device&) { return verify::host_memory(); }

std::vector<double> time_on_device(const Device&, int, const std::function<void()>&) {
    throw Exit{kExitDevice, "this build of strobe has no CUDA kernels"};
}

nlohmann::ordered_json device_json(const Device&) { return nullptr; }

}  // namespace strobe::cli
