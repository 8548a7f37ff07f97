#include "registry.hpp"

#include <fmt/core.h>

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

/// Calls f with each implementation that the call may go to, in order, until f says that it is enough; false if none is
/// left.
template <class F>
bool for_each_candidate(const Problem& problem, F&& f) {
    const char* const wanted = problem.attention.implementation;
    for (const Implementation& i : implementations()) {
        if (i.device_type != problem.attention.q.device_type || (wanted && std::strcmp(wanted, i.name) != 0)) continue;
        if (f(i)) return true;
    }
    return false;
}

template <class Params>
std::string explain_for(const Problem& problem, const Params& params, const Execution& execution) {
    std::string text;
    for_each_candidate(problem, [&](const Implementation& i) {
        const std::string reason = refusal(i, params, execution);
        text += fmt::format("{}: {}\n", i.name, reason.empty() ? describe(i, params, execution) : reason);
        return reason.empty();
    });
    return text;
}

template <class Params>
const Implementation& find_for(const Problem& problem, const Params& params, const Execution& execution) {
    const Implementation* found = nullptr;
    bool known = problem.attention.implementation == nullptr;
    for_each_candidate(problem, [&](const Implementation& i) {
        known = true;
        if (refusal(i, params, execution).empty()) found = &i;
        return found != nullptr;
    });
    if (found) return *found;
    const strobe_tensor& q = problem.attention.q;
    if (!known) {
        invalid_argument(fmt::format("implementation: is \"{}\"; for {} there are: {}", problem.attention.implementation,
                                     device_name(q), names_for(q.device_type)));
    }
    const std::string reasons = explain_for(problem, params, execution);
    if (reasons.empty()) {
        unsupported(fmt::format("q: is on {}, for which this build of strobe has no implementation", device_name(q)));
    }
    unsupported(fmt::format("no implementation serves this call: {}\n{}", to_string(problem), reasons));
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

const Implementation& find(const Problem& problem, const ForwardParams& params, const Execution& execution) {
    return find_for(problem, params, execution);
}

const Implementation& find(const Problem& problem, const BackwardParams& params, const Execution& execution) {
    return find_for(problem, params, execution);
}

const Implementation& find_companion(const char* name, const strobe_tensor& tensor) {
    for (const Implementation& i : implementations()) {
        if (i.device_type == tensor.device_type && i.merge && i.dropout_mask) return i;
    }
    unsupported(fmt::format("{}: is on {}, for which this build of strobe has no implementation", name, device_name(tensor)));
}

std::string explain(const Problem& problem, const ForwardParams& params, const Execution& execution) {
    return explain_for(problem, params, execution);
}

std::string explain(const Problem& problem, const BackwardParams& params, const Execution& execution) {
    return explain_for(problem, params, execution);
}

}  // namespace strobe
