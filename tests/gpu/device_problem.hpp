// One case on the device through the public interface, to be run again and again.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <vector>

#include "verify/verify.hpp"

namespace strobe::gpu_tests {

/// Device memory that lives as long as this does.
class DeviceBuffer {
public:
    explicit DeviceBuffer(size_t bytes);
    ~DeviceBuffer();
    DeviceBuffer(DeviceBuffer&& other) noexcept;
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

class Stream {
public:
    Stream();
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    operator cudaStream_t() const { return stream_; }
    void wait() const;

private:
    cudaStream_t stream_ = nullptr;
};

class DeviceProblem {
public:
    /// Throws Error(unsupported) when the implementation does not serve the case.
    DeviceProblem(const verify::Case& c, const std::string& implementation);

    /// Forward and backward; nothing is waited for.
    void run(cudaStream_t stream) const;
    /// Fills outputs and workspaces with NaN.
    void poison(cudaStream_t stream) const;

    struct Snapshot {
        std::vector<std::pair<std::string, std::vector<std::byte>>> outputs;
    };
    /// Waits for the stream and reads the outputs back; dq only if it repeats to the bit.
    Snapshot snapshot(cudaStream_t stream) const;

    std::string name() const { return data_.spec.name(); }
    const std::string& implementation() const { return implementation_; }
    size_t workspace_bytes() const { return forward_workspace_.bytes() + backward_workspace_.bytes(); }

private:
    const DeviceBuffer& buffer(const verify::View& view) const { return buffers_[static_cast<size_t>(view.buffer)]; }

    verify::CaseData data_;
    std::string wanted_, implementation_;
    std::vector<DeviceBuffer> buffers_;
    verify::Placement placement_;
    verify::PublicCall call_;
    DeviceBuffer forward_workspace_, backward_workspace_;
};

/// "" or which outputs differ, and where.
std::string difference(const DeviceProblem::Snapshot& a, const DeviceProblem::Snapshot& b);

}  // namespace strobe::gpu_tests
