// Registration of forward kernels with the development driver: one translation unit per kernel.
#pragma once

#include <string>
#include <vector>

#include "core/variant.hpp"
#include "cuda/common/launch.hpp"

namespace strobe::dev {

using Launch = cudaError_t (*)(const ForwardParams&, const cuda::LaunchContext&);

struct Kernel {
    std::string name;
    Variant variant;
    Launch launch;
};

inline std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

struct Registration {
    Registration(std::string name, const Variant& variant, Launch launch) {
        kernels().push_back({std::move(name), variant, launch});
    }
};

}  // namespace strobe::dev
