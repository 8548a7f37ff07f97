// The emulated device, in the place of strobe's own header.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace strobe::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(what);
}
inline int device_count(std::string* = nullptr) { return 1; }

struct DeviceLimits {
    int num_sms = 6;
};
inline DeviceLimits device_limits(int) { return {}; }

struct DeviceInfo {
    std::string name = "emulated GPU";
    int compute_capability = 90;
    int num_sms = 6;
};
inline DeviceInfo device_info(int) { return {}; }

}  // namespace strobe::cuda
