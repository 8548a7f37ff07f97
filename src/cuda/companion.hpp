// The functions of the interface beside attention itself, on the device.
#pragma once

#include "core/params.hpp"
#include "cuda/common/launch.hpp"

namespace strobe::cuda {

/// More parts are merged in steps: the first part may be the result of the parts before.
inline constexpr int kMaxMergeParts = 448;

/// `params.num_parts` is at most kMaxMergeParts.
cudaError_t launch_merge(const MergeParams& params, const LaunchContext& context);
cudaError_t launch_dropout_mask(const DropoutMaskParams& params, const LaunchContext& context);

}  // namespace strobe::cuda
