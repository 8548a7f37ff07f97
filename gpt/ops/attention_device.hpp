#pragma once

#include "gpt/ops/exec.hpp"
#include "strobe/strobe.hpp"

namespace strobe::gpt {

/// Where strobe is told that an operator's memory lies: it launches on that device, whose stream must be the one given.
inline strobe::Device attention_device(const Exec& exec) {
    if (exec.device == Device::cpu) return {};
    return {DeviceType::cuda, exec.device_index};
}

}  // namespace strobe::gpt
