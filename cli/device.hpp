// What --device names, and what the commands need of it. A build without CUDA links device_none.cpp in place of
// device_cuda.cpp.
#pragma once

#include <cstddef>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "strobe/strobe.hpp"
#include "verify/verify.hpp"

namespace strobe::cli {

/// "cpu", "cuda", "cuda:1". Throws Exit for anything else, and for a device that is not there.
Device parse_device(const std::string& text);

/// Throws Exit where `name`, what --implementation names, is neither empty nor an implementation for this type of device.
void check_implementation(const std::string& name, const Device& device);

/// Memory of the device.
verify::Memory& device_memory(const Device& device);

/// Memory of the device in which an access beyond a buffer fails, on CUDA by unmapped pages on both sides.
verify::Memory& fenced_memory(const Device& device);

/// Seconds that each of `repeats` runs of the work took on the device, the L2 cache cleared before each. The work is
/// launched on the default stream.
std::vector<double> time_on_device(const Device& device, int repeats, const std::function<void()>& work);

/// Name, compute capability, memory, driver, clocks as they are now. Null on the CPU and without CUDA.
nlohmann::ordered_json device_json(const Device& device);

/// CUDA devices of this machine; `reason` says why there are none.
int cuda_device_count(std::string* reason = nullptr);

}  // namespace strobe::cli
