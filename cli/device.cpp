#include "device.hpp"

#include <fmt/core.h>

#include <charconv>

#include "exit.hpp"

namespace strobe::cli {

Device parse_device(const std::string& text) {
    if (text == "cpu") return {DeviceType::cpu, 0};
    int index = 0;
    const char* const end = text.data() + text.size();
    const bool is_cuda = text == "cuda" || (text.rfind("cuda:", 0) == 0 && text.size() > 5 &&
                                            std::from_chars(text.data() + 5, end, index).ptr == end && index >= 0);
    if (!is_cuda) throw Exit{kExitUsage, fmt::format("--device: is \"{}\"; it must be cpu, cuda or cuda:N", text)};
    std::string reason;
    const int count = cuda_device_count(&reason);
    if (count == 0) throw Exit{kExitDevice, fmt::format("--device: is {}; {}", text, reason)};
    if (index >= count) throw Exit{kExitDevice, fmt::format("--device: is {}; this machine has {} CUDA devices", text, count)};
    return {DeviceType::cuda, index};
}

}  // namespace strobe::cli
