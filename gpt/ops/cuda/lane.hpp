// A second stream beside the operators', tied to it by events, so that both can be recorded as one graph.
#pragma once

#include "gpt/runtime.hpp"

namespace strobe::gpt::cuda {

std::unique_ptr<Lane> make_lane(const Exec& first, Memory& memory, size_t scratch_bytes);

}  // namespace strobe::gpt::cuda
