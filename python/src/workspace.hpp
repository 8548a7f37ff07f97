// How much workspace a call needs: asked from strobe's planner once per shape, since planning costs as much as the rest of a
// small call.
#pragma once

#include "torch_tensor.hpp"

namespace strobe::torch_ops {

size_t workspace_bytes(const strobe_attention& attention, const strobe_forward& forward);
size_t workspace_bytes(const strobe_attention& attention, const strobe_backward& backward);

/// Memory for one call. On CUDA from torch's allocator, where it is safe to drop it as soon as the call is queued. On the CPU a
/// thread keeps one small block for its next call: torch's allocator would spend more time on it than the rest of the call takes.
class Workspace {
public:
    Workspace(size_t bytes, Device device);
    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    Tensor tensor_;
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace strobe::torch_ops
