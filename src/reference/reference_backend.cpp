// The specification as the registry's last implementation for the CPU: serves everything, slowly.
#include "reference/reference.hpp"
#include "registry.hpp"

namespace strobe::reference {

std::span<const Implementation> backend() {
    static const Implementation rows[] = {{
        .name = "reference",
        .device_type = STROBE_CPU,
        .forward_refusal = [](const ForwardParams&, const Execution&) { return std::string(); },
        .backward_refusal = [](const BackwardParams&, const Execution&) { return std::string(); },
        .describe_forward = [](const ForwardParams&, const Execution&) { return std::string("plain fp64 loops, one thread"); },
        .describe_backward = [](const BackwardParams&, const Execution&) { return std::string("plain fp64 loops, one thread"); },
        .forward_workspace = [](const ForwardParams&, const Execution&) { return size_t{0}; },
        .backward_workspace = [](const BackwardParams&, const Execution&) { return size_t{0}; },
        .forward = [](const ForwardParams& p, const Execution&) { forward(p); },
        .backward = [](const BackwardParams& p, const Execution&) { backward(p); },
        .merge = [](const MergeParams& p, const Execution&) { merge(p); },
        .dropout_mask = [](const DropoutMaskParams& p, const Execution&) { dropout_mask(p); },
    }};
    return rows;
}

}  // namespace strobe::reference
