// How much workspace a call needs: asked from strobe's planner once per shape, since planning costs as much as the rest of a
// small call.
#pragma once

#include "torch_tensor.hpp"

namespace strobe::torch_ops {

size_t workspace_bytes(const strobe_attention& attention, const strobe_forward& forward);
size_t workspace_bytes(const strobe_attention& attention, const strobe_backward& backward);

/// Memory for one call, from torch's allocator: on CUDA it is safe to drop it as soon as the call is queued. Empty for 0.
Tensor allocate_workspace(size_t bytes, Device device);

}  // namespace strobe::torch_ops
