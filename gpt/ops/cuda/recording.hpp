#pragma once

#include <functional>
#include <memory>

#include "gpt/runtime.hpp"

namespace strobe::gpt::cuda {

/// What `enqueue` asks of the stream as a CUDA graph.
std::unique_ptr<Recording> record(void* stream, const std::function<void()>& enqueue);

}  // namespace strobe::gpt::cuda
