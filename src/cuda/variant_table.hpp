// The compiled kernels of this build. The table itself is written by CMake from src/variants.def.
#pragma once

#include <span>
#include <vector>

#include "core/variant.hpp"
#include "cuda/common/launch.hpp"

namespace strobe::cuda {

struct VariantRow {
    Variant variant;
    cudaError_t (*forward)(const ForwardParams&, const LaunchContext&);
    cudaError_t (*backward)(const BackwardParams&, const LaunchContext&);
};

std::span<const VariantRow> variant_rows();

}  // namespace strobe::cuda
