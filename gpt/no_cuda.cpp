// A build without CUDA.
#include <stdexcept>

#include "gpt/runtime.hpp"

namespace strobe::gpt::cuda {

std::unique_ptr<Runtime> make_runtime() {
    throw std::invalid_argument("device cuda: this build of strobe has no CUDA kernels; configure with -DSTROBE_CUDA=ON");
}

}  // namespace strobe::gpt::cuda
