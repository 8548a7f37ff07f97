// The CPU kernels as a row of the registry.
#include <fmt/core.h>

#include "cpu/cpu_backend.hpp"
#include "cpu/plan.hpp"
#include "registry.hpp"

namespace strobe::cpu {
namespace {

std::string refusal(const AttentionParams&, const Execution&) { return {}; }

template <class Plan>
std::string describe(const Plan& plan) {
    return fmt::format("{}, {} x {} tiles, {} thread{}", isa_name(current_isa()), plan.block_q, plan.block_k, plan.threads,
                       plan.threads == 1 ? "" : "s");
}

}  // namespace

std::span<const Implementation> backend() {
    static const Implementation rows[] = {{
        .name = "cpu",
        .device_type = STROBE_CPU,
        .forward_refusal = [](const ForwardParams& p, const Execution& e) { return refusal(p, e); },
        .backward_refusal = [](const BackwardParams& p, const Execution& e) { return refusal(p, e); },
        .describe_forward = [](const ForwardParams& p, const Execution& e) { return describe(plan_forward(p, e.num_threads)); },
        .describe_backward = [](const BackwardParams& p, const Execution& e) { return describe(plan_backward(p, e.num_threads)); },
        .forward_workspace = [](const ForwardParams& p, const Execution& e) { return forward_workspace_size(p, e.num_threads); },
        .backward_workspace = [](const BackwardParams& p, const Execution& e) { return backward_workspace_size(p, e.num_threads); },
        .forward = [](const ForwardParams& p, const Execution& e) { forward(p, e.num_threads); },
        .backward = [](const BackwardParams& p, const Execution& e) { backward(p, e.num_threads); },
    }};
    return rows;
}

}  // namespace strobe::cpu
