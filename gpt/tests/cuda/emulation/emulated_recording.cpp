// The emulation records nothing: what is asked for is done.
#include "gpt/ops/cuda/recording.hpp"

namespace strobe::gpt::cuda {

std::unique_ptr<Recording> record(void*, const std::function<void()>&) { return nullptr; }

}  // namespace strobe::gpt::cuda
