// A build without CUDA.
#include <stdexcept>

#include "gpt/distributed/communicator.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr const char* kNoCuda = "device cuda: this build of strobe has no CUDA kernels; configure with -DSTROBE_CUDA=ON";

}  // namespace

std::unique_ptr<Runtime> make_runtime() { throw std::invalid_argument(kNoCuda); }
void choose_gpu(ProcessGroup&) { throw std::invalid_argument(kNoCuda); }
std::unique_ptr<Communicator> make_nccl_communicator(ProcessGroup&, Exec&) { throw std::invalid_argument(kNoCuda); }

}  // namespace strobe::gpt::cuda
