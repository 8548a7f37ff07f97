#include "cuda/device.hpp"

#include <fmt/core.h>

#include <vector>

#include "error.hpp"

namespace strobe::cuda {

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw CallError(STROBE_DEVICE_ERROR,
                    fmt::format("{}: {} ({})", what, cudaGetErrorString(status), cudaGetErrorName(status)));
}

namespace {

std::string why_none(cudaError_t status) {
    if (status == cudaSuccess || status == cudaErrorNoDevice) return "no CUDA device on this machine";
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (status == cudaErrorInsufficientDriver && driver == 0) return "no CUDA driver on this machine";
    if (status == cudaErrorInsufficientDriver) {
        return fmt::format("the driver of this machine serves CUDA {}.{}, this build of strobe needs {}.{}",
                           driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    return cudaGetErrorString(status);
}

}  // namespace

int device_count(std::string* reason) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count > 0) return count;
    cudaGetLastError();
    if (reason) *reason = why_none(status);
    return 0;
}

DeviceLimits device_limits(int device) {
    static std::string reason;
    static const std::vector<DeviceLimits> all = [] {
        std::vector<DeviceLimits> limits(static_cast<size_t>(device_count(&reason)));
        for (size_t d = 0; d < limits.size(); ++d) {
            const auto attribute = [&](cudaDeviceAttr a) {
                int value = 0;
                check(cudaDeviceGetAttribute(&value, a, static_cast<int>(d)), "cudaDeviceGetAttribute");
                return value;
            };
            limits[d].compute_capability =
                10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
            limits[d].num_sms = attribute(cudaDevAttrMultiProcessorCount);
            limits[d].smem_per_cta = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        }
        return limits;
    }();
    if (device < 0 || static_cast<size_t>(device) >= all.size()) {
        throw CallError(STROBE_DEVICE_ERROR,
                        all.empty() ? fmt::format("cuda:{}: {}", device, reason)
                                    : fmt::format("cuda:{}: this machine has {} CUDA devices", device, all.size()));
    }
    return all[static_cast<size_t>(device)];
}

DeviceInfo device_info(int device) {
    const DeviceLimits limits = device_limits(device);
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    DeviceInfo info;
    info.name = properties.name;
    info.compute_capability = limits.compute_capability;
    info.num_sms = limits.num_sms;
    info.memory_bytes = properties.totalGlobalMem;
    info.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
    check(cudaDriverGetVersion(&info.driver_version), "cudaDriverGetVersion");
    check(cudaRuntimeGetVersion(&info.runtime_version), "cudaRuntimeGetVersion");
    return info;
}

DeviceGuard::DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    // Even where the number is the same: a thread that has not called the runtime yet (the one of PyTorch's backward)
    // has no context, which the driver's encoder of tensor maps fails without.
    check(cudaSetDevice(device), "cudaSetDevice");
    switched_ = previous_ != device;
}

DeviceGuard::~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
}

}  // namespace strobe::cuda
