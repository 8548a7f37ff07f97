#include "device.hpp"

#include <fmt/core.h>

#include <charconv>
#include <system_error>

#include "exit.hpp"
#include "registry.hpp"

namespace strobe::cli {

Device parse_device(const std::string& text) {
    if (text == "cpu") return {DeviceType::cpu, 0};
    int index = 0;
    const auto is_index = [&](const char* begin, const char* end) {
        const auto [stop, error] = std::from_chars(begin, end, index);
        return error == std::errc() && stop == end && index >= 0;
    };
    const bool is_cuda =
        text == "cuda" || (text.rfind("cuda:", 0) == 0 && is_index(text.data() + 5, text.data() + text.size()));
    if (!is_cuda) throw Exit{kExitUsage, fmt::format("--device: is \"{}\"; it must be cpu, cuda or cuda:N", text)};
    std::string reason;
    const int count = cuda_device_count(&reason);
    if (count == 0) throw Exit{kExitDevice, fmt::format("--device: is {}; {}", text, reason)};
    if (index >= count) throw Exit{kExitDevice, fmt::format("--device: is {}; this machine has {} CUDA devices", text, count)};
    return {DeviceType::cuda, index};
}

void check_implementation(const std::string& name, const Device& device) {
    if (name.empty()) return;
    std::string names;
    for (const Implementation& i : implementations()) {
        if (i.device_type != static_cast<int32_t>(device.type)) continue;
        if (name == i.name) return;
        names += (names.empty() ? "" : ", ") + std::string(i.name);
    }
    throw Exit{kExitUsage, fmt::format("--implementation: is \"{}\"; for {} there are: {}", name,
                                       device.type == DeviceType::cpu ? "cpu" : "cuda", names)};
}

}  // namespace strobe::cli
