#include "gpt/backend.hpp"

namespace strobe::gpt {

Backend::Backend(Device device, int threads)
    : team_(device == Device::cpu ? threads : 1),
      runtime_(device == Device::cpu ? make_host_runtime() : cuda::make_runtime()) {
    exec_.device = device;
    exec_.team = &team_;
    exec_.times = &times_;
    runtime_->equip(exec_);
}

OpTimes& Backend::times() {
    runtime_->collect(times_);
    return times_;
}

void Backend::reserve_scratch(size_t bytes) {
    if (bytes <= exec_.scratch_bytes) return;
    runtime_->synchronize();
    scratch_ = Arena();
    scratch_ = Arena(bytes, *runtime_);
    exec_.scratch = scratch_.at<void>(0);
    exec_.scratch_bytes = bytes;
}

}  // namespace strobe::gpt
