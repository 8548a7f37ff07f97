#include "registry.hpp"

#include <fmt/format.h>

#include <cstring>
#include <vector>

#include "backends.hpp"
#include "error.hpp"
#include "tensor.hpp"

namespace strobe {
namespace {

std::string refusal(const Implementation& i, const ForwardParams& p, const Execution& e) { return i.forward_refusal(p, e); }
std::string refusal(const Implementation& i, const BackwardParams& p, const Execution& e) { return i.backward_refusal(p, e); }
std::string describe(const Implementation& i, const ForwardParams& p, const Execution& e) { return i.describe_forward(p, e); }
std::string describe(const Implementation& i, const BackwardParams& p, const Execution& e) { return i.describe_backward(p, e); }

std::string names_for(int32_t device_type) {
    std::string names;
    for (const Implementation& i : implementations()) {
        if (i.device_type == device_type) names += fmt::format("{}{}", names.empty() ? "" : ", ", i.name);
    }
    return names.empty() ? "none" : names;
}

template <class Params>
Choice find_for(const Problem& problem, const Params& params, const Execution& execution) {
    const strobe_tensor& q = problem.attention.q;
    const char* wanted = problem.attention.implementation;
    Choice choice;
    bool known = wanted == nullptr;
    for (const Implementation& i : implementations()) {
        if (i.device_type != q.device_type) continue;
        if (wanted && std::strcmp(wanted, i.name) != 0) continue;
        known = true;
        const std::string reason = refusal(i, params, execution);
        if (reason.empty()) {
            choice.implementation = &i;
            choice.explanation += fmt::format("{}: {}\n", i.name, describe(i, params, execution));
            return choice;
        }
        choice.explanation += fmt::format("{}: {}\n", i.name, reason);
    }
    if (!known) {
        invalid_argument(fmt::format("implementation: is \"{}\"; for {} there are: {}", wanted, device_name(q),
                                     names_for(q.device_type)));
    }
    if (choice.explanation.empty()) {
        unsupported(fmt::format("q: is on {}, for which this build of strobe has no implementation", device_name(q)));
    }
    unsupported(fmt::format("no implementation serves this call: {}\n{}", to_string(problem), choice.explanation));
}

}  // namespace

std::span<const Implementation> implementations() {
    static const std::vector<Implementation> all = [] {
        std::vector<Implementation> list;
        for (const auto backend : kBackends) {
            const std::span<const Implementation> rows = backend();
            list.insert(list.end(), rows.begin(), rows.end());
        }
        return list;
    }();
    return all;
}

Choice find(const Problem& problem, const ForwardParams& params, const Execution& execution) {
    return find_for(problem, params, execution);
}

Choice find(const Problem& problem, const BackwardParams& params, const Execution& execution) {
    return find_for(problem, params, execution);
}

const Implementation& find_companion(const char* name, const strobe_tensor& tensor) {
    for (const Implementation& i : implementations()) {
        if (i.device_type == tensor.device_type && i.merge && i.dropout_mask) return i;
    }
    unsupported(fmt::format("{}: is on {}, for which this build of strobe has no implementation", name, device_name(tensor)));
}

}  // namespace strobe
