#pragma once

#include "gpt/device.hpp"

namespace strobe::gpt::cuda {

/// Numbers between -1 and 1 that look random: what a product is timed on, for on zeros the chip is faster.
void fill_noise(void* stream, Buffer data, int64_t count, uint32_t seed);

}  // namespace strobe::gpt::cuda
