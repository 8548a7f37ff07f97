// The devices of this machine and what tools need of them: limits, names, memory, timing.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "cuda/select.hpp"

namespace strobe::cuda {

/// Throws CallError(device_error) with the call and the driver's words.
void check(cudaError_t status, const char* what);

/// Devices that the driver shows; 0 without a driver. `reason` then says why.
int device_count(std::string* reason = nullptr);

/// Limits of a device, read once. Throws CallError when there is no such device.
DeviceLimits device_limits(int device);

struct DeviceInfo {
    std::string name;
    int compute_capability = 0;
    int num_sms = 0;
    size_t memory_bytes = 0;
    size_t l2_bytes = 0;
    int driver_version = 0;   // 13000 for 13.0
    int runtime_version = 0;
};
DeviceInfo device_info(int device);

/// Makes a device current while it lives, as every launch on it needs.
class DeviceGuard {
public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool switched_ = false;
};

}  // namespace strobe::cuda
